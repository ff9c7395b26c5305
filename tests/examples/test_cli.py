import jax
import pytest
from bert_finetune import cli
from bert_finetune.errors import Interrupted, UserError

NAMES = [
    "compilation_cache_dir",
    "compilation_cache_max_size",
    "enable_compilation_cache",
]


@pytest.fixture
def config(monkeypatch, tmp_path):
    """Yields JAX's configuration without a cache; restores it afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, f"jax_{name}") for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(f"jax_{name}", value)


def test_programs_are_cached_in_the_users_cache_directory(config, tmp_path):
    cli.set_up_jax()
    assert config.jax_compilation_cache_dir == str(tmp_path / "mfac_jax" / "xla")
    assert config.jax_compilation_cache_max_size > 0


def test_an_existing_jax_configuration_is_kept(config):
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    cli.set_up_jax()
    assert config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    cli.set_up_jax()
    assert config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such file"), "error: no such file"),
        (Interrupted("stopped", 130), 130),
        (KeyboardInterrupt(), "interrupted; nothing is lost."),
    ],
)
def test_user_errors_are_one_line_and_an_exit_code(error, code, monkeypatch):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run_script(main, "nothing is lost.")
    assert caught.value.code == code
    if isinstance(error, UserError):
        monkeypatch.setenv("FINETUNE_TRACEBACK", "1")
        with pytest.raises(UserError):
            cli.run_script(main, "nothing is lost.")


def test_other_errors_keep_their_traceback():
    def main():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        cli.run_script(main, "nothing is lost.")
