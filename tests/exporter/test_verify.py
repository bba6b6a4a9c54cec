"""The verify stage finds what the writing got wrong: every check of it fails on the damage that it is for."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dispatcher.artifacts import StoredFile
from dispatcher.crc32c import Crc32c
from dispatcher.errors import VerificationFailed
from dispatcher.local_artifacts import LocalArtifacts
from exporter.adapter import Adapter, read_adapter
from exporter.attempt import Attempt
from exporter.checkpoint import open_checkpoint, read_tensor_file
from exporter.gemma import FAMILIES as KNOWN
from exporter.ledger import ledger_of
from exporter.merge import write_merged
from exporter.pairs import LoraPair
from exporter.plan import Plan, plan_merge
from exporter.verify import verify_merged, verify_reference
from tests.gemmas import make_adapter, save_base

WEIGHTS = "model.safetensors"
Written = tuple[LocalArtifacts, Plan, Adapter, StoredFile]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A merge that was written and not verified yet: pairs, magnitudes, a replaced norm, an added head, copies."""
    model = save_base("gemma3_text", tmp_path / "base", dtype=torch.float32)
    make_adapter(
        "gemma3_text",
        model,
        tmp_path / "adapter",
        targets=["q_proj", "lm_head"],
        use_dora=True,
        modules_to_save=["norm"],
    )
    adapter = read_adapter(tmp_path / "adapter")
    config = model.config.to_dict()
    plan = plan_merge(open_checkpoint(tmp_path / "base"), adapter, KNOWN["gemma3_text"], config)
    store = LocalArtifacts(tmp_path / "store")
    attempt = Attempt(store, "v")
    file = attempt.publish(WEIGHTS, lambda writer: write_merged(plan.files[0], adapter, writer, lambda _: None))
    return store, plan, adapter, file


def verified(written: Written) -> dict[str, object]:
    store, plan, adapter, file = written
    return verify_merged(store, "v", plan, adapter, [file])


def path_in(store: LocalArtifacts) -> Path:
    return Path(store.uri("v").removeprefix("file://")) / WEIGHTS


def damaged(written: Written, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Written:
    """Values of one tensor changed in the written file, with a checksum that fits: as if it had been written so."""
    store, plan, adapter, file = written
    path = path_in(store)
    place = next(found for found in read_tensor_file(path).tensors if found.name == tensor)
    raw = bytearray(path.read_bytes())
    values = torch.frombuffer(raw, dtype=torch.float32, count=place.nbytes // 4, offset=place.start)
    values.copy_(change(values.clone()))
    path.write_bytes(raw)
    crc = Crc32c()
    crc.update(bytes(raw))
    return store, plan, adapter, dataclasses.replace(file, crc32c=crc.text)


def refusal(written: Written) -> str:
    with pytest.raises(VerificationFailed) as refused:
        verified(written)
    return refused.value.error_code


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
class TestTheChecks:
    def test_what_was_written_right_passes(self, written: Written) -> None:
        found = verified(written)
        assert found["merged_sampled"] == 3
        assert found["replaced_sampled"] == 12  # of all whose names end with `norm`

    def test_another_byte_than_was_written(self, written: Written) -> None:
        path = path_in(written[0])
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
        assert refusal(written) == "checksum_differs"

    def test_another_header(self, written: Written) -> None:
        path = path_in(written[0])
        path.write_bytes(path.read_bytes().replace(b"q_proj", b"x_proj", 1))
        assert refusal(written) == "header_differs"

    @pytest.mark.parametrize(
        ("tensor", "code"),
        [
            ("model.layers.0.self_attn.q_proj.weight", "merge_wrong"),
            ("lm_head.weight", "merge_wrong"),
            ("model.norm.weight", "merge_wrong"),
            ("model.embed_tokens.weight", "copy_differs"),
        ],
    )
    def test_values_a_little_off(self, tensor: str, code: str, written: Written) -> None:
        assert refusal(damaged(written, tensor, lambda values: values * (1 + 1e-4))) == code

    def test_a_pair_merged_with_another_scale(self, written: Written) -> None:
        store, plan, adapter, file = written
        outputs = tuple(
            dataclasses.replace(output, change=dataclasses.replace(output.change, scale=2.5))
            if isinstance(output.change, LoraPair)
            else output
            for output in plan.files[0].tensors
        )
        meant = dataclasses.replace(plan, files=(dataclasses.replace(plan.files[0], tensors=outputs),))
        assert refusal((store, meant, adapter, file)) == "merge_wrong"

    def test_a_ledger_that_leaves_a_tensor_out(self, written: Written) -> None:
        _, plan, adapter, _ = written
        kept = tuple(
            dataclasses.replace(output, change=None) if output.tensor.name == "model.norm.weight" else output
            for output in plan.files[0].tensors
        )
        short = dataclasses.replace(plan, files=(dataclasses.replace(plan.files[0], tensors=kept),))
        with pytest.raises(VerificationFailed) as refused:
            ledger_of(short, adapter, KNOWN["gemma3_text"], {})
        assert refused.value.error_code == "ledger_unbalanced"


def test_what_a_reference_engine_wrote_must_be_finite_and_changed(tmp_path: Path) -> None:
    save_base("gemma3_text", tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    with pytest.raises(VerificationFailed) as same:
        verify_reference(tmp_path / "base", base, KNOWN["gemma3_text"])
    assert same.value.error_code == "nothing_changed"
    model = save_base("gemma3_text", tmp_path / "other", seed=1)
    model.model.norm.weight.data[0] = torch.nan
    save_base("gemma3_text", tmp_path / "other", model=model)
    with pytest.raises(VerificationFailed) as broken:
        verify_reference(tmp_path / "other", base, KNOWN["gemma3_text"])
    assert broken.value.error_code == "output_not_finite"
