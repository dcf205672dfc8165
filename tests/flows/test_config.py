from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from components.environments import storefront
from components.errors import InputError
from flows.config import SOURCES, LoopConfig, load_config, source_path


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "loop.toml"


def test_without_a_word_the_configuration_is_the_default() -> None:
    assert load_config(None, []) == LoopConfig()


def test_settings_go_over_the_file_and_the_file_over_the_defaults(toml: Path) -> None:
    toml.write_text("seed = 3\n[reinforce]\ngamma = 0.5\niterations = 7\n")
    config = load_config(toml, ["reinforce.gamma=0.25", "ab.salt=new"])
    assert (config.seed, config.reinforce.gamma, config.reinforce.iterations) == (3, 0.25, 7)
    assert (config.ab.salt, config.cem) == ("new", LoopConfig().cem)


def test_settings_may_be_any_json_and_otherwise_are_text() -> None:
    config = load_config(None, ["as_of=2026-01-02T00:00:00Z", "adversarial.rounds=0", "source.personal=1"])
    assert config.as_of == datetime(2026, 1, 2, tzinfo=UTC)
    assert config.adversarial.rounds == 0
    assert load_config(None, ["as_of=null"]).as_of is None


def test_a_source_named_aside_keeps_the_files_settings_only_if_they_are_its_own(toml: Path) -> None:
    toml.write_text('[source]\nname = "storefront"\nn_users = 77\n')
    kept = load_config(toml, [], "storefront").source
    assert isinstance(kept, storefront.Config)
    assert kept.n_users == 77
    assert load_config(toml, [], "sessions").source == SOURCES["sessions"]()
    assert load_config(toml, []).source == kept


def test_a_path_becomes_whole_wherever_the_run_takes_place(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml.write_text('[source]\nname = "table"\nmapping = "mapping.toml"\n')
    monkeypatch.chdir(tmp_path)
    config = load_config(toml, [])
    assert config.source.mapping == tmp_path / "mapping.toml"  # type: ignore[attr-defined]
    assert load_config(toml, [], "table") == config


def test_a_group_without_a_name_is_the_storefronts(toml: Path) -> None:
    toml.write_text("[source]\nn_users = 77\n")
    assert isinstance(load_config(toml, []).source, storefront.Config)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("bogus=1", ["unknown key 'bogus'", "the top level has: loop, seed"]),
        ("reinforce.gama=1", ["unknown key 'reinforce.gama'", "reinforce has:", "gamma"]),
        ("source.bogus=1", ["unknown key 'source.bogus'", "source has:", "n_users"]),
        ("source.mapping=x", ["unknown key 'source.mapping'", "n_users"]),
        ("seed=many", ["seed = 'many'", "valid integer"]),
        ("seed=-1", ["seed = -1", "greater than or equal to 0"]),
        ("cem.population=4", ["configuration: cem: elite = 10: expected at most population = 4"]),
        ("ab.sessions=5", ["ab.sessions = 5", "greater than or equal to 100"]),
        ("source.n_users=few", ["source.n_users = 'few'", "valid integer"]),
        ("reinforce.gamma=2", ["reinforce.gamma = 2", "less than or equal to 1"]),
        ("reinforce.gamma=NaN", ["reinforce.gamma = nan", "finite"]),
        ("gate.ess_floor_requests=Infinity", ["gate.ess_floor_requests = inf", "finite"]),
        ("loop=My Shop", ["loop = 'My Shop'", "match pattern"]),
        ("as_of=2026-01-01", ["as_of = '2026-01-01'", "timezone"]),
        ("reinforce=3", ["reinforce = 3", "dictionary"]),
        ("source=storefront", ["source = 'storefront'", "dictionary"]),
        ("source.name=obd", ["source.campaign: missing", "'all', 'men' or 'women'", "--set source.campaign=VALUE"]),
        (
            "source.name=nowhere",
            ["source.name = 'nowhere'", "storefront, log, movielens, obd, sessions, table, trivago"],
        ),
        ("seed", ["--set seed", "expected a.b=c"]),
        ("=1", ["--set =1", "expected a.b=c"]),
        ("a..b=1", ["--set a..b=1", "expected a.b=c"]),
    ],
)
def test_a_wrong_setting_is_refused_with_key_value_and_what_was_expected(setting: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(None, [setting])
    for word in words:
        assert word in str(caught.value)


def test_a_setting_below_a_value_is_refused(toml: Path) -> None:
    toml.write_text("seed = 1\n")
    with pytest.raises(InputError, match=r"--set seed\.x=1: 'seed' is no group of settings"):
        load_config(toml, ["seed.x=1"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"seed = ", "is no TOML"),
        (b"\xff\xfe", "is no TOML"),
        (b'seed = "x"', "seed = 'x'"),
        (b'source = "sessions"', "source = 'sessions'"),
        (b"[[source]]\nname = 'table'", "source = "),
        (b"[reinforce]\ngamma = nan", "reinforce.gamma = nan"),
    ],
)
def test_a_bad_file_is_refused(toml: Path, content: bytes, words: str) -> None:
    toml.write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_config(toml, [])


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.toml: cannot be read: No such file"):
        load_config(tmp_path / "nothing.toml", [])
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_config(tmp_path, [])


def test_an_unknown_source_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"'shop'.*the sources are: storefront, log, movielens, obd, sessions, table, trivago"
    ):
        load_config(None, [], "shop")


def test_a_configuration_survives_being_written_and_cannot_be_changed() -> None:
    config = load_config(None, ["seed=4", "as_of=2026-01-02T00:00:00Z"], "table")
    assert LoopConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        config.seed = 5  # type: ignore[misc]


def test_every_setting_says_what_it_is() -> None:
    groups = [LoopConfig, *SOURCES.values()]
    groups += [type(value) for _, value in LoopConfig() if hasattr(type(value), "model_fields")]
    for group in groups:
        for name, field in group.model_fields.items():
            is_group = hasattr(field.annotation, "model_fields") or name == "name"
            assert is_group or field.description, f"{group.__name__}.{name}"


def test_a_source_that_reads_needs_something_to_read(tmp_path: Path) -> None:
    config = load_config(None, [], "sessions")
    with pytest.raises(InputError, match="'sessions' reads a file or folder: give it with --path"):
        source_path(config, None)
    with pytest.raises(InputError, match="nothing: no such file or folder"):
        source_path(config, tmp_path / "nothing")
    assert source_path(config, tmp_path) == tmp_path.resolve()


def test_a_simulated_source_reads_nothing(tmp_path: Path) -> None:
    assert source_path(LoopConfig(), None) is None
    with pytest.raises(InputError, match="'storefront' is simulated"):
        source_path(LoopConfig(), tmp_path)
