"""The one place that reads the environment, so that every other part is given its values."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

from dispatcher.contract import is_token
from dispatcher.errors import Misconfigured

DEFAULT_BUCKET = "gemma-export-bucket"
MAX_DOWNLOAD_URL_SECONDS = 12 * 3600
"""A key of Google's own, which keyless signing uses, may be gone after that."""
MAX_LEASE_SECONDS = 24 * 3600
CLOCK_SKEW_SECONDS = 120
"""Two clocks, each a minute off"""
_SCHEMES = {
    "RECORDS_URL": ("sqlite", "firestore"),
    "ARTIFACTS_URL": ("file", "gs"),
    "QUEUE_URL": ("inline", "pubsub"),
    "RUNNER_URL": ("process", "run"),
    "TOKENS_URL": ("file", "secretmanager"),
}
"""Per port: the embedded scheme, then Google's."""
_CLOUD_VARIABLES = ("PROJECT_ID", "GCS_EXPORT_BUCKET_NAME", "K_SERVICE", "CLOUD_RUN_JOB")
_TRUE = ("1", "ON", "YES", "TRUE")
"""Source: https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/constants.py"""
_ENGINES = ("auto", "streaming", "peft", "unsloth")


@dataclass(frozen=True)
class JwtCheck:
    """What a caller's own JWT must say, checked besides the gateway's header."""

    issuer: str
    audience: str
    jwks_url: str


@dataclass(frozen=True)
class Settings:
    """Everything that the environment decides; see `from_env` for the variables."""

    home: Path
    bucket: str
    records_url: str
    artifacts_url: str
    queue_url: str
    runner_url: str
    tokens_url: str
    embedded: bool
    """No cloud setting anywhere: only then may a local user exist."""
    project_id: str | None = None
    lease_seconds: int = 120
    clock_skew_seconds: int = 0
    """How much longer a lease is good in the record, where machines with clocks of their own judge it"""
    max_unfinished_per_user: int = 20
    max_attempts: int = 4
    """As many as a first try and the three retries that Cloud Run and the embedded runner make."""
    engine: str = "auto"
    memory_budget_mib: int = 512
    """What the exporter may take beyond its interpreter and libraries, in MiB"""
    base_cache: bool = True
    """Whether bases from the hub are kept in the bucket"""
    verify_logits: bool = True
    """Whether a merged model's logits are compared, where the memory budget holds the model"""
    token_ttl_seconds: int = 7 * 24 * 3600
    """At least as long as the queue keeps a message, or a replayed message would find its token gone."""
    collect_after_seconds: int = 7 * 24 * 3600
    """How long older versions and abandoned attempts are kept after an export ended; at least as long as a download URL
    may be good, which can have been signed a moment before the newer version was published."""
    download_url_seconds: int = 3600
    signing_account: str | None = None
    """The service account that signs download URLs; None is the one that the process runs as."""
    jwt: JwtCheck | None = None
    export_id: str | None = None
    lease_id: str | None = None
    execution: str | None = None
    task_index: int = 0
    task_count: int = 1
    task_attempt: int = 0
    hf_token: str | None = field(default=None, repr=False)
    hf_endpoint: str | None = field(default=None, repr=False)
    """Where the exporter finds the hub; None is the Hugging Face hub. It may hold a password. The exporter's
    huggingface_hub reads this and the next itself: here they are for doctor."""
    hub_offline: bool = False
    """Whether the exporter asks no hub at all"""
    id_token: str | None = field(default=None, repr=False)
    """What the CLI shows a dispatcher behind a URL."""
    traceparent: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings; an empty variable counts as one that is not set.

        Raises:
            Misconfigured: A variable has a value that cannot be meant; the message names it, what was found
                and what is expected.
        """
        env = {name: value for name, value in environ.items() if value.strip()}
        home = Path(env.get("GEMMA_EXPORT_HOME", ".gemma-export")).expanduser().absolute()
        project = env.get("PROJECT_ID")
        bucket = env.get("GCS_EXPORT_BUCKET_NAME", DEFAULT_BUCKET)
        defaults = _google_urls(project, bucket, env) if project else _embedded_urls(home)
        if not project:
            _refuse_half_a_cloud(env, defaults)
        urls = {name: _url(env, name, default) for name, default in defaults.items()}
        cloud = any(name in env for name in _CLOUD_VARIABLES)
        tasks = _number(env, "CLOUD_RUN_TASK_COUNT", cls.task_count, at_least=1)
        cloud = cloud or any(urlsplit(url).scheme != _SCHEMES[name][0] for name, url in urls.items())
        return cls(
            home=home,
            bucket=bucket,
            records_url=urls["RECORDS_URL"],
            artifacts_url=urls["ARTIFACTS_URL"],
            queue_url=urls["QUEUE_URL"],
            runner_url=urls["RUNNER_URL"],
            tokens_url=urls["TOKENS_URL"],
            embedded=not cloud,
            project_id=project,
            lease_seconds=_number(env, "LEASE_SECONDS", cls.lease_seconds, at_least=1, at_most=MAX_LEASE_SECONDS),
            clock_skew_seconds=_number(env, "CLOCK_SKEW_SECONDS", CLOCK_SKEW_SECONDS if cloud else 0, at_least=0),
            max_unfinished_per_user=_number(env, "MAX_UNFINISHED_PER_USER", cls.max_unfinished_per_user, at_least=1),
            max_attempts=_number(env, "MAX_ATTEMPTS", cls.max_attempts, at_least=1),
            engine=_choice(env, "ENGINE", cls.engine, _ENGINES),
            memory_budget_mib=_number(env, "MEMORY_BUDGET_MIB", cls.memory_budget_mib, at_least=64),
            base_cache=_choice(env, "BASE_CACHE", "auto", ("auto", "never")) == "auto",
            verify_logits=_choice(env, "VERIFY_LOGITS", "auto", ("auto", "never")) == "auto",
            token_ttl_seconds=_number(env, "TOKEN_TTL_SECONDS", cls.token_ttl_seconds, at_least=60),
            collect_after_seconds=_number(
                env, "COLLECT_AFTER_SECONDS", cls.collect_after_seconds, at_least=MAX_DOWNLOAD_URL_SECONDS
            ),
            download_url_seconds=_number(
                env, "DOWNLOAD_URL_SECONDS", cls.download_url_seconds, at_least=1, at_most=MAX_DOWNLOAD_URL_SECONDS
            ),
            signing_account=env.get("SIGNING_ACCOUNT"),
            jwt=_jwt_check(env),
            export_id=env.get("EXPORT_ID"),
            lease_id=env.get("LEASE_ID"),
            execution=env.get("CLOUD_RUN_EXECUTION"),
            task_index=_number(env, "CLOUD_RUN_TASK_INDEX", cls.task_index, at_least=0, at_most=tasks - 1),
            task_count=tasks,
            task_attempt=_number(env, "CLOUD_RUN_TASK_ATTEMPT", 0, at_least=0),
            hf_token=_token(env),
            hf_endpoint=env.get("HF_ENDPOINT"),
            hub_offline=(env.get("HF_HUB_OFFLINE") or env.get("TRANSFORMERS_OFFLINE", "")).upper() in _TRUE,
            id_token=env.get("GEMMA_EXPORT_ID_TOKEN"),
            traceparent=env.get("TRACEPARENT"),
        )

    @property
    def log_dir(self) -> Path:
        """Where the embedded runner keeps one log file per execution."""
        return self.home / "logs"

    def to_environment(self) -> dict[str, str]:
        """The variables that make a child process open the very same stores. Never holds a secret."""
        environment = {
            "GEMMA_EXPORT_HOME": str(self.home),
            "RECORDS_URL": self.records_url,
            "ARTIFACTS_URL": self.artifacts_url,
            "QUEUE_URL": self.queue_url,
            "RUNNER_URL": self.runner_url,
            "TOKENS_URL": self.tokens_url,
            "LEASE_SECONDS": str(self.lease_seconds),
            "CLOCK_SKEW_SECONDS": str(self.clock_skew_seconds),
            "MAX_ATTEMPTS": str(self.max_attempts),
            "ENGINE": self.engine,
            "MEMORY_BUDGET_MIB": str(self.memory_budget_mib),
            "BASE_CACHE": "auto" if self.base_cache else "never",
            "VERIFY_LOGITS": "auto" if self.verify_logits else "never",
            "TOKEN_TTL_SECONDS": str(self.token_ttl_seconds),
            "COLLECT_AFTER_SECONDS": str(self.collect_after_seconds),
        }
        if self.project_id:
            environment |= {"PROJECT_ID": self.project_id, "GCS_EXPORT_BUCKET_NAME": self.bucket}
        return environment


def _refuse_half_a_cloud(env: Mapping[str, str], defaults: Mapping[str, str]) -> None:
    """Without its project, a deployment would quietly keep everything on a disk that is gone with its container."""
    found = [name for name in _CLOUD_VARIABLES if name in env]
    if found and not defaults.keys() <= env.keys():
        raise Misconfigured(
            f"{', '.join(found)} is set and PROJECT_ID is not: expected PROJECT_ID for Google Cloud, "
            f"each of {', '.join(defaults)}, or no cloud setting at all"
        )


def _embedded_urls(home: Path) -> dict[str, str]:
    return {
        "RECORDS_URL": f"sqlite://{quote(str(home / 'records.db'))}",
        "ARTIFACTS_URL": (home / "artifacts").as_uri(),
        "QUEUE_URL": "inline:",
        "RUNNER_URL": "process:",
        "TOKENS_URL": (home / "tokens").as_uri(),
    }


def _google_urls(project: str, bucket: str, env: Mapping[str, str]) -> dict[str, str]:
    region, job = env.get("REGION", "us-central1"), env.get("EXPORTER_JOB", "gemma-exporter")
    return {
        "RECORDS_URL": f"firestore://{project}/(default)",
        "ARTIFACTS_URL": f"gs://{bucket}",
        "QUEUE_URL": f"pubsub://{project}/{env.get('EXPORT_TOPIC', 'gemma-export')}",
        "RUNNER_URL": f"run://{project}/{region}/{job}",
        "TOKENS_URL": f"secretmanager://{project}",
    }


def _url(env: Mapping[str, str], name: str, default: str) -> str:
    url = env.get(name, default)
    if urlsplit(url).scheme not in _SCHEMES[name]:
        ours, googles = _SCHEMES[name]
        raise Misconfigured(f"{name} is {url!r}: expected a URL that starts with {ours}: or {googles}:")
    return url


def _number(env: Mapping[str, str], name: str, default: int, *, at_least: int, at_most: int | None = None) -> int:
    text = env.get(name, str(default)).strip()
    good = text.isascii() and text.isdigit() and int(text) >= at_least and (at_most is None or int(text) <= at_most)
    if not good:
        limit = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise Misconfigured(f"{name} is {text!r}: expected a whole number {limit}")
    return int(text)


def _token(env: Mapping[str, str]) -> str | None:
    text = env.get("HF_TOKEN", "").strip()
    if text and not is_token(text):
        raise Misconfigured("HF_TOKEN is no token: expected 1 to 512 printable ASCII characters without spaces")
    return text or None


def _jwt_check(env: Mapping[str, str]) -> JwtCheck | None:
    names = ("JWT_ISSUER", "JWT_AUDIENCE", "JWT_JWKS_URL")
    values = [env.get(name) for name in names]
    if not any(values):
        return None
    issuer, audience, jwks_url = values
    if not issuer or not audience or not jwks_url:
        missing = ", ".join(name for name, value in zip(names, values, strict=True) if not value)
        raise Misconfigured(f"{missing} is not set: expected {', '.join(names)} together, or none of them")
    return JwtCheck(issuer, audience, jwks_url)


def _choice(env: Mapping[str, str], name: str, default: str, choices: tuple[str, ...]) -> str:
    text = env.get(name, default)
    if text not in choices:
        raise Misconfigured(f"{name} is {text!r}: expected one of {', '.join(choices)}")
    return text
