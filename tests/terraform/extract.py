"""`python -m tests.terraform.extract`: the provider's schema, as far as `infra/*.tf` uses it, written to `schema.json`.

No registry of Terraform's is needed: the packages `cdktf-cdktf-provider-…`, which are not developed any more, were
generated from the schema of the providers. Each class of theirs says in a comment of a nested block whether it is
optional or required, by its class whether it is a list, a set or at most one, and by the getters, setters and resets of
an argument its type and whether it is optional, required or computed.
"""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGES = {
    "google": "cdktf-cdktf-provider-google==16.12.1",
    "google-beta": "cdktf-cdktf-provider-google-beta==16.12.1",
    "time": "cdktf-cdktf-provider-time==11.0.1",
}
SCHEMA = Path(__file__).with_name("schema.json")
INFRA = Path(__file__).parents[2] / "infra"
_MODULE = r"package/lib/[^/]+/index\.js"

_CLASS = re.compile(r"^class (\w+) extends ", re.MULTILINE)
_KIND = re.compile(r"terraformResourceType: '(\w+)'")
_VERSION = re.compile(r"providerVersion: '([\d.]+)'")
_FLAGS = re.compile(r"// (\w+) - computed: (true|false), optional: (true|false), required: (true|false)")
_NESTED = re.compile(r'new (?!cdktf\.)(\w+?)(OutputReference|List|Map)\(this, "(\w+)"(?:, (true|false))?\)')
_GETTER = re.compile(
    r"get (\w+)\(\) \{\s+return (?:cdktf\.Fn\.tolist\()?"
    r"this\.get((?:String|Number|Boolean)(?:Map)?|List|NumberList)Attribute\('(\w+)'\)"
)
_SET = re.compile(r"cdktf\.Fn\.tolist\(this\.get\w+Attribute\('(\w+)'\)\)")
_MAP = re.compile(r'new cdktf\.(StringMap|BooleanMap|NumberMap)\(this, "(\w+)"\)')
_STORED = re.compile(
    r'^ {8,12}(\w+): \{\s+value: .*\s+isBlock: (?:true|false),\s+type: "(\w+)",\s+storageClassType: "(\w+)"',
    re.MULTILINE,
)
"""Of an argument: its name, how it is kept, and as what."""
_USED = re.compile(r'^(resource|data)\s+"(\w+)"', re.MULTILINE)
_CONFIGURED = ("project", "region", "billing_project", "user_project_override", "default_labels")
"""Of a provider's own two hundred arguments, those that are ours to set."""
_TYPES = {
    "String": "string",
    "Number": "number",
    "Boolean": "bool",
    "List": "list(string)",
    "NumberList": "list(number)",
    "StringMap": "map(string)",
    "BooleanMap": "map(bool)",
    "NumberMap": "map(number)",
}

Block = dict[str, Any]


def main() -> int:
    """Download, extract what is used, and write it."""
    used = _used()
    schema: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for provider, package in PACKAGES.items():
            modules = _modules(package, Path(temporary, provider))
            (configured,) = (text for text in modules if " extends cdktf.TerraformProvider" in text)
            version = _VERSION.search(configured)
            schema[provider] = {
                "package": package,
                "version": version and version[1],
                "provider": _provider(configured),
                "resource": {},
                "data": {},
            }
            for text in modules:
                kind, classes = _KIND.search(text), _classes(text)
                name = next((name for name in classes if f"class {name} extends cdktf.Terraform" in text), "")
                use = ("data" if name.startswith("DataGoogle") else "resource", kind[1] if kind else "")
                if use in used:
                    used.remove(use)
                    schema[provider][use[0]][use[1]] = _block(classes, name)
    if used:
        raise SystemExit(f"neither package has {sorted(used)}")
    SCHEMA.write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")
    return 0


def _used() -> set[tuple[str, str]]:
    return {(use[1], use[2]) for path in INFRA.glob("*.tf") for use in _USED.finditer(path.read_text())}


def _modules(package: str, directory: Path) -> list[str]:
    """The JavaScript modules in a Python package of cdktf's, which carries them as an archive."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), package]
    subprocess.run(command, check=True)
    (wheel,) = directory.glob("*.whl")
    found = []
    with zipfile.ZipFile(wheel) as whole:
        (inner,) = (name for name in whole.namelist() if name.endswith(".jsii.tgz"))
        with whole.open(inner) as file, tarfile.open(fileobj=file) as archive:
            for member in archive:
                source = archive.extractfile(member) if re.fullmatch(_MODULE, member.name) else None
                if source:
                    found.append(source.read().decode())
    return found


def _classes(text: str) -> dict[str, str]:
    """The text of each class, by its name."""
    starts = [*_CLASS.finditer(text)]
    ends = [*(start.start() for start in starts[1:]), len(text)]
    return {start[1]: text[start.start() : end] for start, end in zip(starts, ends, strict=True)}


def _provider(text: str) -> Block:
    stored = {name: kept for name, _, kept in _STORED.findall(text)}
    types = {"string": "string", "boolean": "bool", "stringMap": "map(string)"}
    attributes = {name: f"optional {types[stored[name]]}" for name in _CONFIGURED if name in stored}
    return {"attributes": attributes, "blocks": {}}


def _block(classes: dict[str, str], name: str) -> Block:
    """A block of the schema; what is nested and only computed is left out, since nothing sets it.

    What can be set has a setter, and what need not be set a way to reset it.
    """
    text = classes[name]
    attributes: Block = {argument: f"computed {_TYPES[kind]}" for kind, argument in _MAP.findall(text)}
    for getter, kind, argument in _GETTER.findall(text):
        settable, optional = f"set {getter}(value)" in text, f"reset{getter[0].upper()}{getter[1:]}()" in text
        told = "optional" if optional else "required" if settable else "computed"
        attributes[argument] = f"{told} {_TYPES[kind]}"
    for argument in _SET.findall(text):
        attributes[argument] = attributes[argument].replace("list(", "set(")
    kept = {argument: kind for argument, kind, _ in _STORED.findall(text)}
    blocks: Block = {}
    flags = {argument: told for argument, *told in _FLAGS.findall(text)}
    for match in _NESTED.finditer(text):
        _, optional, required = (flag == "true" for flag in flags[match[3]])
        if optional or required:
            blocks[match[3]] = _nested(classes, match, kept.get(match[3])) | {"required": required}
    return {"attributes": attributes, "blocks": blocks}


def _nested(classes: dict[str, str], match: "re.Match[str]", kept: str | None) -> Block:
    name, kind, _, is_set = match.groups()
    block = _block(classes, f"{name}OutputReference")
    if kept == "struct":
        return {"nesting": "single", **block}
    limits = {"max": 1} if kind == "OutputReference" else {}
    return {"nesting": "set" if is_set == "true" else "list", **limits, **block}


if __name__ == "__main__":
    sys.exit(main())
