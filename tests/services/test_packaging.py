from pathlib import Path

import pytest

from components.errors import InputError
from services.packaging import build_bento


def test_a_bento_needs_arms(bentoml_home: Path) -> None:
    with pytest.raises(InputError, match="there are none"):
        build_bento({})


def test_a_bento_is_not_built_around_the_latest_policy(policy_tag: str) -> None:
    with pytest.raises(InputError, match="latest is never served"):
        build_bento({"champion": policy_tag.partition(":")[0] + ":latest"})
