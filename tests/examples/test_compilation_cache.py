import jax
import pytest
from bert_finetune.training import compilation_cache

NAMES = [
    "compilation_cache_dir",
    "compilation_cache_max_size",
    "enable_compilation_cache",
]


@pytest.fixture
def config(monkeypatch, tmp_path):
    """JAX's settings as they are without a cache; afterwards as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, f"jax_{name}") for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(f"jax_{name}", value)


def test_programs_are_kept_in_the_cache_of_the_user(config, tmp_path):
    compilation_cache.enable()
    assert config.jax_compilation_cache_dir == str(tmp_path / "mfac_jax" / "xla")
    assert config.jax_compilation_cache_max_size > 0


def test_what_jax_was_told_stays(config):
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    compilation_cache.enable()
    assert config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.enable()
    assert config.jax_compilation_cache_dir is None
