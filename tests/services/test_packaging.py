import pytest

from components.errors import InputError
from services.packaging import build_bento


def test_a_bento_does_not_bring_the_latest_policy(policy_tag: str) -> None:
    with pytest.raises(InputError, match="latest is never served"):
        build_bento([policy_tag.partition(":")[0] + ":latest"])
