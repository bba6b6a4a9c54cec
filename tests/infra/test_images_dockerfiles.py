"""Facts of the two Dockerfiles: what a reviewer would look for in each, every time."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dispatcher import main
from infra.functions import SIGNATURES
from infra.images_context import Context
from infra.images_dockerfile import Dockerfile, Instruction, Stage, assignments, expanded, read, words
from infra.locks import LOCKS, ROOT
from tests.terraform.running import Resource

DISPATCHER = ROOT / "dispatcher" / "Dockerfile"
EXPORTER = ROOT / "exporter" / "Dockerfile"
COMPILERS = re.compile(r"(gcc|g\+\+|cpp|clang|cmake|ninja-build|make|build-essential|binutils)(-\d+)?|.*-dev")
IMAGES = {
    "dispatcher": read(DISPATCHER),
    "gpu": read(EXPORTER),
    "cpu": read(EXPORTER, {"VARIANT": "cpu"}),
}
every_image = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
both_files = pytest.mark.parametrize("path", [DISPATCHER, EXPORTER], ids=lambda path: path.parent.name)


def last(image: Dockerfile, name: str) -> Instruction:
    """The last such instruction of the image's last stage."""
    return [one for one in image.stages[-1].instructions if one.name == name][-1]


def lineage(image: Dockerfile) -> list[Stage]:
    """The last stage, and those it starts from: what they run stays in the image."""
    found = [image.stages[-1]]
    while parent := image.stage(image.base_of(found[-1])):
        found.append(parent)
    return found


def packages(stages: list[Stage]) -> set[str]:
    """What apt installs there."""
    runs = [one.value for stage in stages for one in stage.instructions if one.name == "RUN"]
    found = re.findall(r"apt-get install ([^&]*)", " && ".join(runs))
    return {word for words in found for word in words.split() if not word.startswith("-")}


def copied(image: Dockerfile) -> list[str]:
    """What is copied from the repository, by the stages that make this image."""
    found = []
    for stage in image.needed():
        for one in (one for one in stage.instructions if one.name == "COPY" and "from" not in one.options):
            found += expanded(one.value, image.arguments, one.where).split()[:-1]
    return found


@both_files
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [str(part) for part in (hadolint, "--config", ROOT / ".hadolint.yaml", path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@every_image
def test_bases_are_pinned_to_an_exact_version(image: Dockerfile) -> None:
    bases = {image.base_of(stage) for stage in image.stages} - {stage.name for stage in image.stages}
    assert bases
    for base in bases:
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", base), base


@every_image
def test_the_user_is_a_number_and_not_root(image: Dockerfile) -> None:
    """Where there is no name, Kubernetes' and Cloud Run's checks can tell; and nothing after it is root's again."""
    users = [one.value for one in image.stages[-1].instructions if one.name == "USER"]
    assert users == ["10001:10001"]


@both_files
def test_nothing_is_fetched_by_the_builder_itself(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"^\s*ADD\b", text, re.MULTILINE)
    assert not re.search(r"\b(curl|wget)\b|git clone", text)
    assert "latest" not in text


@both_files
def test_each_pip_install_has_hashes_but_torchs_and_our_own(path: Path) -> None:
    text = re.sub(r"\\\n\s*", "", path.read_text())
    installs = re.findall(r"(?:pip\"?|python\") install [^&\n]*", text)
    without = [one for one in installs if "--require-hashes" not in one]
    assert all("${TORCH}" in one or "--no-index" in one for one in without), without
    assert len(installs) > len(without)


def dependencies(image: Dockerfile) -> list[str]:
    """What is run one after the other where the image's environment is installed, as it would be typed."""
    stage = image.stage("dependencies")
    assert stage is not None
    runs = [one.value for one in stage.instructions if one.name == "RUN"]
    return [re.sub(r'["\s]+', " ", command).strip() for run in runs for command in run.split("&&")]


@every_image
def test_what_was_installed_goes_together(image: Dockerfile) -> None:
    """Locks are installed without their dependencies being looked at; so pip looks at the whole in the end."""
    commands = dependencies(image)
    (check,) = (place for place, one in enumerate(commands) if re.fullmatch(r".*\b(pip|python)\S* check", one))
    assert check > max(place for place, one in enumerate(commands) if " install " in one or "infra.llama_cpp" in one)


@every_image
def test_there_is_no_pip_in_what_runs(image: Dockerfile) -> None:
    """Whoever gets in finds nothing to install with; bytecode is compiled of what is left."""
    commands = dependencies(image)
    (made,) = (one for one in commands if "-m venv " in one)
    if "--without-pip" not in made.split():
        (removed,) = (place for place, one in enumerate(commands) if one == "${VENV}/bin/pip uninstall --yes pip")
        assert not [one for one in commands[removed + 1 :] if "pip " in one]
        assert "compileall" in commands[removed + 1]


@every_image
def test_the_user_has_a_name_all_the_same(image: Dockerfile) -> None:
    """torch asks for it, and no file in the image has one for a number."""
    assert dict(assignments(last(image, "ENV")))["LOGNAME"] == (
        "dispatcher" if image is IMAGES["dispatcher"] else "exporter"
    )


def test_the_entry_points_are_those_that_terraform_and_the_runner_count_on() -> None:
    assert words(last(IMAGES["dispatcher"], "ENTRYPOINT")) == ["python", "-m", "functions_framework"]
    assert words(last(IMAGES["gpu"], "ENTRYPOINT")) == ["python", "-m", "exporter"]
    assert words(last(IMAGES["cpu"], "ENTRYPOINT")) == ["python", "-m", "exporter"]


def test_each_function_that_is_served_is_there() -> None:
    assert all(callable(getattr(main, target)) for target in SIGNATURES)
    environment = dict(assignments(last(IMAGES["dispatcher"], "ENV")))
    assert environment["FUNCTION_SOURCE"] == "${APP}/dispatcher/main.py"
    assert "FUNCTION_TARGET" not in environment


def test_a_server_has_a_thread_for_each_request_that_cloud_run_sends_it(plan: list[Resource]) -> None:
    """More requests would queue in it, unseen by Cloud Run; the sweep is one at a time."""
    threads = int(dict(assignments(last(IMAGES["dispatcher"], "ENV")))["THREADS"] or 0)
    functions = [each for each in plan if each.address == "google_cloud_run_v2_service.function"]
    sent = {each.key: each.values["template"][0]["max_instance_request_concurrency"] for each in functions}
    assert sent == {"export_api": threads, "start_export": threads, "fail_export": threads, "sweep": 1}


def test_each_function_is_tried_as_it_is_deployed(plan: list[Resource]) -> None:
    """With the signature that Terraform says."""
    functions = [each for each in plan if each.address == "google_cloud_run_v2_service.function"]
    containers = [each.values["template"][0]["containers"][0] for each in functions]
    told = [{one["name"]: one["value"] for one in container["env"]} for container in containers]
    assert {one["FUNCTION_TARGET"]: one["FUNCTION_SIGNATURE_TYPE"] for one in told} == SIGNATURES


@every_image
def test_nothing_is_written_beside_the_code_at_run_time(image: Dockerfile) -> None:
    environment = dict(assignments(last(image, "ENV")))
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert environment["HOME"] == "${SCRATCH}"
    assert image.arguments["SCRATCH"] == "/tmp"  # noqa: S108  # what a container has for everybody to write into


@every_image
def test_there_is_no_compiler_in_what_runs(image: Dockerfile) -> None:
    assert not [name for name in packages(lineage(image)) if COMPILERS.fullmatch(name)]
    copies = [one for one in image.stages[-1].instructions if one.name == "COPY"]
    assert {one.options.get("from") for one in copies} == {"dependencies", "code"}


def test_llama_cpp_is_built_where_a_compiler_is() -> None:
    """So that the test before would see one."""
    stage = IMAGES["gpu"].stage("llama")
    assert stage is not None
    assert [name for name in packages([stage]) if COMPILERS.fullmatch(name)]


@every_image
def test_no_list_of_apts_and_no_recommended_package_is_left(image: Dockerfile) -> None:
    runs = [one.value for stage in image.stages for one in stage.instructions if "apt-get" in one.value]
    for run in runs:
        assert "--no-install-recommends" in run
        assert run.endswith("rm -rf /var/lib/apt/lists/*")


def test_only_the_gpu_image_is_made_from_the_lock_with_unsloth() -> None:
    assert "exporter/requirements-gpu.lock" in copied(IMAGES["gpu"])
    assert "exporter/requirements-cpu.lock" not in copied(IMAGES["gpu"])
    assert "exporter/requirements-gpu.lock" not in copied(IMAGES["cpu"])
    said = [one.value for stage in IMAGES["gpu"].stages for one in stage.instructions]
    assert not [value for value in said if "unsloth" in value]


def test_the_gpu_image_looks_for_cudas_own_driver_library_first() -> None:
    stage = IMAGES["gpu"].stage("gpu")
    assert stage is not None
    (one,) = (one for one in stage.instructions if one.name == "ENV")
    assert one.value == "LD_LIBRARY_PATH=/usr/local/cuda/compat:/usr/local/nvidia/lib64"
    assert stage.name in {stage.name for stage in IMAGES["gpu"].needed()}
    assert stage.name not in {stage.name for stage in IMAGES["cpu"].needed()}


def test_torch_is_pinned_as_in_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pin,) = (pin for pin in extras["exporter"] if pin.startswith("torch=="))
    stage = IMAGES["gpu"].stage("dependencies")
    assert stage is not None
    defaults = dict(pair for one in stage.instructions if one.name == "ARG" for pair in assignments(one))
    assert defaults["TORCH"] == pin
    assert defaults["TORCH_INDEX"] == ""


@every_image
def test_whatever_is_copied_is_sent_to_the_build(image: Dockerfile) -> None:
    context = Context(ROOT)
    for source in copied(image):
        assert context.matching(source), source


@pytest.mark.parametrize("name", ["infra/local/cloud.py", ".git/config", "tests/conftest.py", ".env", "infra/x.tfvars"])
def test_what_no_image_needs_is_not_sent_to_the_build(name: str) -> None:
    assert Context(ROOT).ignores(name)


@pytest.mark.parametrize("package", ["dispatcher", "exporter"])
def test_every_file_of_a_package_is_in_its_image(package: str) -> None:
    """COPY names kinds of files, so a new kind, or a package within, would be left out unseen."""
    image = IMAGES["dispatcher" if package == "dispatcher" else "cpu"]
    context = Context(ROOT)
    inside = {path for source in copied(image) for path in context.matching(source) if path.parts[0] == package}
    there = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()}
    left_out = {str(path) for path in there - inside if "__pycache__" not in path.parts}
    locks = {lock.path for lock in LOCKS if lock.path.startswith(package)}
    assert left_out - locks == {f"{package}/Dockerfile"}


@every_image
def test_what_is_copied_is_uploaded_too(image: Dockerfile) -> None:
    """Of .gcloudignore each line names a file or a directory, wherever it is."""
    lines = [line.strip() for line in (ROOT / ".gcloudignore").read_text().splitlines()]
    patterns = [line.rstrip("/") for line in lines if line and not line.startswith("#")]
    assert not any("/" in pattern or pattern.startswith("!") for pattern in patterns)
    context = Context(ROOT)
    uploaded = [path for source in copied(image) for path in context.matching(source)]
    uploaded += [
        Path(".dockerignore"),
        Path(".ci/run"),
        Path("tests/conftest.py"),
        Path("Makefile"),
        Path(".gitignore"),
    ]
    for path in uploaded:
        assert not any(re.fullmatch(glob(pattern), part) for pattern in patterns for part in path.parts), path


def test_the_upload_holds_no_history_no_environment_and_no_secret() -> None:
    lines = (ROOT / ".gcloudignore").read_text().splitlines()
    assert {".git/", ".venv/", ".venv-unsloth/", "__pycache__/", "*.tfstate", "*.tfvars"} <= set(lines)
    ignored = (ROOT / ".gitignore").read_text().split()
    assert set(ignored) <= set(lines) | {line.rstrip("/") for line in lines}


def glob(pattern: str) -> str:
    return ".*".join(re.escape(piece) for piece in pattern.split("*"))
