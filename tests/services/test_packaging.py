import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from components.errors import InputError
from services.packaging import PACKAGES, build_bento

IMPORTED = """
import sys, services.recommender
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""
#: What BentoML and torch import where it is there, and do without.
OPTIONAL = {"charset-normalizer", "h2", "hpack", "hyperframe", "pydot", "pyparsing", "sniffio", "tqdm"}


def test_a_bento_does_not_bring_the_latest_policy(policy_tag: str) -> None:
    with pytest.raises(InputError, match="latest is never served"):
        build_bento([policy_tag.partition(":")[0] + ":latest"])


def test_a_bento_holds_code_and_policies_and_nothing_else(policy_tag: str) -> None:
    """No key, no token and no database of this machine can be in an image."""
    import bentoml

    source = Path(bentoml.get(build_bento([policy_tag])).path) / "src"
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    assert {file.parts[0] for file in files} == {"services", "components", "bentofile.yaml"}
    assert {file.suffix for file in files} == {".py", ".yaml"}


def test_the_service_imports_what_comes_with_the_bento_and_needs_no_model_store(tmp_path: Path) -> None:
    """Every distribution that is loaded is required, by the Bento or by what it requires."""
    home = tmp_path / "untouched"
    environment = os.environ | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert not home.exists()
    owners = packages_distributions()
    loaded = {_name(one) for module in done.stdout.split() for one in owners.get(module, ())[:1]}
    required: set[str] = set()
    waiting = [_name(name) for name in ("bentoml", *PACKAGES)]
    while waiting:
        name = waiting.pop()
        if name in required:
            continue
        required.add(name)
        try:
            waiting += [_name(line) for line in requires(name) or () if "extra ==" not in line]
        except Exception:  # for another platform
            continue
    assert loaded - required - OPTIONAL - {"slateloop"} == set()


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[._-]+", "-", found[0]).lower()
