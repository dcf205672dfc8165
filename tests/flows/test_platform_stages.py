import shutil
from pathlib import Path

import pytest

from components.errors import InputError
from components.interactions.log_folder import Log, open_log
from flows.config import LoopConfig
from flows.platform_stages import publish_log, version_data
from flows.settings import PlatformSettings


@pytest.fixture
def dataset(storefront_log: Log, tmp_path: Path) -> Path:
    shutil.copytree(storefront_log.path, tmp_path / "dataset" / "log")
    return tmp_path / "dataset"


def test_the_version_holds_while_the_log_lies_where_it_was_published(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    version_data.compute(LoopConfig(), dataset=dataset, out=out, progress=lambda message, share: None)
    published = PlatformSettings().data / "storefront"
    assert open_log(published).manifest == open_log(dataset / "log").manifest
    assert version_data.still_there(out)
    manifest = published / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    manifest.write_text(text.replace(open_log(dataset / "log").manifest.content_digest, "another log's"))
    assert not version_data.still_there(out)
    shutil.rmtree(published)
    assert not version_data.still_there(out)


def test_a_published_log_replaces_an_older_one_and_leaves_nothing_beside_it(dataset: Path, tmp_path: Path) -> None:
    log = open_log(dataset / "log")
    for _ in range(2):
        publish_log(log, tmp_path / "published" / "storefront")
    assert [path.name for path in (tmp_path / "published").iterdir()] == ["storefront"]
    assert open_log(tmp_path / "published" / "storefront").manifest == log.manifest


def test_what_is_no_log_is_never_replaced_by_one(dataset: Path, tmp_path: Path) -> None:
    own = tmp_path / "data" / "table"
    own.mkdir(parents=True)
    (own / "raw.csv").write_text("visit,shown")
    with pytest.raises(InputError, match="is not empty and holds no log"):
        publish_log(open_log(dataset / "log"), own)
    assert [path.name for path in own.iterdir()] == ["raw.csv"]
    assert [path.name for path in own.parent.iterdir()] == ["table"]
