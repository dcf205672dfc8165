import shutil
from pathlib import Path

import pytest
import torch
from gate_evidence import ab, evidence

from components.errors import InputError
from components.experiment.gate import GateConfig, GateRecord, Outcome
from components.policies.policy_folder import DESCRIPTION, StoredPolicy
from services.policy_store import load_gate_record, load_model, save_model


def test_a_saved_policy_is_loaded_again_by_its_exact_tag(policy_tag: str, stored: StoredPolicy) -> None:
    loaded = load_model(policy_tag)
    assert loaded.description == stored.description
    for name, tensor in stored.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor)


def test_saving_the_same_policy_again_gives_the_same_tag(policy_tag: str, policy_folder: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(policy_folder, tmp_path / "copy")
    decided = {"verdict": "canary"}
    assert save_model(elsewhere, name="shop-policy", lineage={"seed": 3}, decision=decided) == policy_tag


def test_the_same_policy_under_another_decision_is_another_version(policy_tag: str, policy_folder: Path) -> None:
    import bentoml

    held = save_model(policy_folder, name="shop-policy", lineage={"seed": 3}, decision={"verdict": "hold"})
    assert held != policy_tag
    assert bentoml.models.get(held).info.metadata["decision"] == {"verdict": "hold"}
    assert bentoml.models.get(policy_tag).info.metadata["decision"] == {"verdict": "canary"}


def test_another_policy_gets_another_version(policy_tag: str, policy_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(policy_folder, tmp_path / "other")
    text = (other / DESCRIPTION).read_text()
    (other / DESCRIPTION).write_text(text.replace("tiny-1", "tiny-2"))
    tag = save_model(other, name="shop-policy", lineage={}, decision={})
    assert tag != policy_tag
    assert load_model(tag).description.name == "tiny-2"


def test_lineage_and_decision_stand_in_the_models_metadata(policy_folder: Path, bentoml_home: Path) -> None:
    import bentoml

    lineage = {"seed": 3, "champion": None, "data": {"digest": "abc", "rows": [1, 2]}}
    tag = save_model(
        policy_folder, name="with-lineage", lineage=lineage, decision={"verdict": "hold", "reasons": ["ESS"]}
    )
    info = bentoml.models.get(tag).info
    assert info.metadata["lineage"] == {"seed": 3, "data": {"digest": "abc", "rows": [1, 2]}}
    assert info.metadata["decision"] == {"verdict": "hold", "reasons": ["ESS"]}
    assert info.labels == {"loop": "shop", "policy": "tiny-1", "kind": "ranking"}


def test_a_policy_carries_the_evidence_that_it_was_judged_by(policy_folder: Path, policy_tag: str) -> None:
    record = GateRecord(evidence=evidence(ab=None), config=GateConfig(ess_floor_requests=600))
    tag = save_model(
        policy_folder, name="shop-policy", lineage={"seed": 3}, decision={"verdict": "canary"}, gate=record
    )
    assert tag != policy_tag
    assert load_gate_record(tag) == record
    assert record.decision().outcome is Outcome.CANARY
    assert record.live_decision(ab()).outcome is Outcome.PROMOTE
    assert record.live_decision(None).outcome is Outcome.HOLD
    assert load_gate_record(policy_tag) is None


@pytest.mark.parametrize(
    "tag", ["shop-policy", "shop-policy:", "shop-policy:latest", "shop-policy:nothing", "Ä:1", ":1"]
)
def test_only_an_exact_tag_in_the_store_is_loaded(policy_tag: str, tag: str) -> None:
    with pytest.raises(InputError, match="policy tag"):
        load_model(tag)


def test_the_beginning_of_a_version_is_not_taken_for_it(policy_tag: str) -> None:
    with pytest.raises(InputError, match="not exact"):
        load_model(policy_tag[:-4])


def test_a_folder_without_a_policy_is_refused(tmp_path: Path, bentoml_home: Path) -> None:
    with pytest.raises(InputError, match="holds no policy"):
        save_model(tmp_path, name="shop-policy", lineage={}, decision={})


def test_a_name_that_cannot_be_a_tag_is_refused(policy_folder: Path, bentoml_home: Path) -> None:
    with pytest.raises(InputError, match="model name"):
        save_model(policy_folder, name="no spaces please", lineage={}, decision={})
