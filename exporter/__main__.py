"""`python -m exporter JOB_ID`: what the cloud runs, what an operator reruns by hand, and what a laptop starts."""

import os
import signal

if __name__ == "__main__":
    # Nothing is held yet. A container's first process would not even end by it.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(75))

import argparse
import hashlib
import json
import logging
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from dispatcher import logs
from dispatcher.artifacts import open_artifacts
from dispatcher.contract import QUANTIZATIONS, ExportType, is_job_id
from dispatcher.errors import ExportError, InvalidRequest
from dispatcher.records import open_records
from dispatcher.settings import Settings
from dispatcher.tokens import open_tokens
from exporter.stopping import Stop

log = logging.getLogger("exporter")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read arguments and environment, run the job, and return the exit code (see `job.ExitCode`)."""
    args = _parser().parse_args(arguments)
    if args.inspect:
        return _inspect(args.inspect, args.base)
    stop = Stop()
    stop.on_signals()
    stop.enforce()
    logs.configure(sys.stderr, {"job_id": args.job_id})
    try:
        settings = Settings.from_env()
        fields = {
            "job_id": args.job_id,
            "execution": settings.execution,
            "task": settings.task_index if settings.task_count > 1 else None,
            "traceparent": settings.traceparent,
        }
        logs.configure(sys.stderr, fields, project_id=settings.project_id)
        if not is_job_id(args.job_id):
            raise InvalidRequest(f"{args.job_id[:80]!r} is not a job id.", code="job_id_invalid")
        if args.quantization and args.export_type != ExportType.GGUF:
            raise InvalidRequest("--quantization goes with --export-type gguf.", code="invalid_request")
        # After the cheap checks: it brings in torch.
        from exporter.job import Stores, run_job
        from exporter.lease import Term
        from exporter.making import Checks
        from exporter.order import Order

        execution = settings.execution or f"local-{secrets.token_hex(6)}"
        order = Order(
            job_id=args.job_id,
            execution=execution,
            engine=args.engine or settings.engine,
            export_id=settings.export_id,
            lease_id=settings.lease_id,
            export_type=ExportType(args.export_type) if args.export_type else None,
            quantization=args.quantization,
            force_nonce=_nonce(execution) if args.force else None,
            task_index=settings.task_index,
            task_count=settings.task_count,
            task_attempt=settings.task_attempt,
        )
        stores = Stores(
            records=open_records(settings.records_url),
            artifacts=open_artifacts(settings.artifacts_url),
            tokens=open_tokens(settings.tokens_url, ttl_seconds=settings.token_ttl_seconds),
            term=Term(settings.lease_seconds, settings.clock_skew_seconds),
            max_attempts=settings.max_attempts,
            checks=Checks(logits=settings.verify_logits, memory_budget=settings.memory_budget_mib << 20),
            base_cache=settings.base_cache,
            hf_token=settings.hf_token,
        )
        return run_job(order, stores, stop)
    except ExportError as error:
        log.error("%s (%s)", error.message, error.error_code)
        return 75 if error.retryable else 1
    except Exception:
        # A traceback of the interpreter's own would be no JSON, and would show what a log line must not.
        log.exception("unexpected fault")
        return 75


def _inspect(adapter: Path, base: str | None) -> int:
    """Print the report of `exporter.inspection` as JSON; 1 where the adapter is refused."""
    logs.configure(sys.stderr, {}, level=logging.WARNING)
    try:
        settings = Settings.from_env()
        from exporter.inspection import inspect

        report = inspect(adapter, base, lambda: settings.hf_token)
    except ExportError as error:
        report = {"outcome": "refused", "code": error.error_code, "message": error.message}
    json.dump(report, sys.stdout, indent=1)
    return int(report["outcome"] == "refused")


def _nonce(execution: str) -> str:
    """The same for every attempt of an execution, which goes on where the one before ended."""
    return hashlib.sha256(execution.encode()).hexdigest()[:8]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporter",
        description="Make the exports of a training job: every unfinished or failed one, or the one asked for.",
        epilog="Exit codes: 0 nothing is left to do, 1 failed for good (the record says why), 75 try again.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("job_id", metavar="JOB_ID", nargs="?")
    what.add_argument("--inspect", metavar="ADAPTER", type=Path, help="print what merging this adapter would do")
    parser.add_argument("--base", help="with --inspect: hub id or directory; default: what the adapter names")
    parser.add_argument("--export-type", choices=[kind.value for kind in ExportType], help="this one, requested or not")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="with --export-type gguf")
    parser.add_argument("--engine", choices=("auto", "streaming", "peft", "unsloth"), help="default: ENGINE, else auto")
    parser.add_argument("--force", action="store_true", help="make even a finished export anew, as a new version")
    return parser


if __name__ == "__main__":
    sys.exit(main())
