import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bert_finetune.arguments import GlueArguments, parse_arguments
from bert_finetune.errors import UserError
from bert_finetune.model import bert
from bert_finetune.training import memory, optax_optimizers, optimizers
from bert_finetune.training.schedules import make_schedule

pytestmark = pytest.mark.usefixtures("quick_compilation")


def args_of(optim="MFAC", optim_args=None, *flags):
    required = "--model_name_or_path m --task_name qqp --output_dir o --do_train"
    if optim_args is not None:
        flags = (*flags, "--optim_args", optim_args)
    return parse_arguments(GlueArguments, [*required.split(), "--optim", optim, *flags])


MAX_ROWS = {"word_embeddings": 5, "position_embeddings": 4}


def make_optimizer(args, num_steps=10, params=None):
    hyperparams = optimizers.parse_hyperparams(args)
    params = PARAMS if params is None else params
    return optimizers.make_optimizer(args, hyperparams, num_steps, MAX_ROWS, params)


PARAMS = {
    "dense": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3)},
    "LayerNorm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
}


def test_hyperparameters_come_from_optim_args_flags_and_defaults():
    optim_args = '{"lr": 1e-3, "num_grads": 4, "window": "int8"}'
    optimizer = make_optimizer(args_of("MFAC", optim_args, "--weight_decay", "0.1"), 10)
    assert optimizer.hyperparams == {
        "lr": 1e-3,
        "num_grads": 4,
        "damp": 1e-6,
        "momentum": 0.0,
        "window": "int8",
        "word_lr": None,
        "weight_decay": 0.1,
    }
    # "lr" overrides --learning_rate; the schedule scales whichever is used.
    assert optimizer.schedule(0) == pytest.approx(1e-3)
    assert optimizer.schedule(5) == pytest.approx(5e-4)
    optimizer = make_optimizer(args_of("adamw"), 10)
    assert optimizer.schedule(5) == pytest.approx(2.5e-5)
    assert optimizer.hyperparams == {
        "lr": 5e-5,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "word_lr": None,
        "weight_decay": 0.0,
    }


@pytest.mark.parametrize("num_warmup", [0, 1, 8, 29, 30, 45])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_schedules_are_hugging_faces(kind, num_warmup):
    """Compares with `get_{kind}_schedule_with_warmup` during training."""
    num_steps = 30
    flags = ("--lr_scheduler_type", kind, "--warmup_steps", str(num_warmup))
    schedule = make_schedule(args_of("adamw", None, *flags), 2.0, num_steps)
    for step in range(num_steps):
        if step < num_warmup:
            expected = step / num_warmup
        else:
            progress = (step - num_warmup) / (num_steps - num_warmup)
            expected = {
                "linear": 1 - progress,
                "cosine": (1 + np.cos(np.pi * progress)) / 2,
                "constant_with_warmup": 1.0,
            }[kind]
        assert schedule(step) == pytest.approx(2.0 * expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "num_warmup"),
    [
        ("", 0),
        ("--warmup_ratio 0.05", 2),
        ("--warmup_ratio 1", 30),
        ("--warmup_steps 7", 7),
        ("--warmup_steps 7 --warmup_ratio 0.5", 7),
        ("--warmup_steps 100", 100),
    ],
)
def test_schedule_comes_from_the_flags(flags, num_warmup):
    args = args_of("adamw", None, "--lr_scheduler_type", "cosine", *flags.split())
    schedule = make_optimizer(args, 30).schedule
    flags = ("--lr_scheduler_type", "cosine", "--warmup_steps", str(num_warmup))
    expected = make_schedule(args_of("adamw", None, *flags), 5e-5, 30)
    assert [schedule(step) for step in range(30)] == [expected(s) for s in range(30)]


@pytest.mark.parametrize("optim", ["MFAC", "adamw"])
def test_gradients_are_clipped_before_the_optimizer(optim):
    optim_args = '{"num_grads": 2, "window": "dense"}' if optim == "MFAC" else None
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.01), PARAMS)
    large = jax.tree.map(lambda x: 1e4 * x, gradients)
    unit = jax.tree.map(lambda x: x / optax.tree.norm(gradients), gradients)

    def first_update(gradients, *flags):
        optimizer = make_optimizer(
            args_of(optim, optim_args, *flags), 10
        ).transformation
        return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[0]

    def assert_close(a, b):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4)

    assert_close(first_update(large), first_update(unit))
    assert_close(
        first_update(large, "--max_grad_norm", "0.5"),
        first_update(jax.tree.map(lambda x: x / 2, unit)),
    )
    small = jax.tree.map(lambda x: x / 100, unit)
    assert_close(first_update(small), first_update(small, "--max_grad_norm", "0"))


@pytest.mark.parametrize(
    "optim",
    "MFAC adam_mfac adamw optax.adamw lion lamb lars contrib.muon".split(),
)
def test_decay_spares_biases_and_norms(optim):
    mask = bert.decay_mask(PARAMS)
    assert mask == {
        "dense": {"kernel": True, "bias": False},
        "LayerNorm": {"scale": False, "bias": False},
    }
    optim_args = {"lr": 0.1, "weight_decay": 0.5}
    if optim in ("MFAC", "adam_mfac"):
        optim_args["window"] = "dense"
    optimizer = make_optimizer(args_of(optim, json.dumps(optim_args))).transformation
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    assert np.all(np.asarray(updates["dense"]["kernel"]) < 0)
    assert not any(
        np.any(updates[k][n])
        for k, n in [("dense", "bias"), ("LayerNorm", "scale"), ("LayerNorm", "bias")]
    )


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        (
            "nonsense",
            None,
            r"--optim must be MFAC, adam_mfac, adamw or the name of an Optax .* "
            r"got 'nonsense'\.$",
        ),
        ("muon", None, r"got 'muon'\. Did you mean contrib\.muon\?"),
        ("mfac", None, "Did you mean MFAC or adam_mfac"),
        ("optax.MFAC", None, "Did you mean MFAC or adam_mfac"),
        ("contrib.adamw", None, "Did you mean adamw"),
        ("adamw_torch", None, "Did you mean adamw"),
        ("scale_by_rprop", None, "got 'scale_by_rprop'"),
        ("polyak_sgd", None, "an Optax optimizer with a learning_rate, such as"),
        (
            "lion",
            '{"learning_rate": 1}',
            "unknown key 'learning_rate'; lion accepts lr, b1, b2, mu_dtype, weight_",
        ),
        ("lion", '{"mask": null}', "unknown key 'mask'"),
        ("lars", '{"weight_decay_mask": true}', "unknown key 'weight_decay_mask'"),
        ("contrib.sophia", '{"hessian_diagonal_fn": 1}', "unknown key 'hessian_dia"),
        ("lion", '{"lr": null}', "lr in --optim_args must be .* got None"),
        ("lion", '{"b1": "0.9"}', "b1 in --optim_args must be a number, got '0.9'"),
        ("lion", '{"b1": true}', "b1 in --optim_args must be a number, got True"),
        (
            "MFAC",
            '{"damp": null}',
            "damp in --optim_args must be a positive number, got N",
        ),
        ("sgd", '{"nesterov": 1}', "nesterov .* must be true or false, got 1"),
        ("sgd", '{"momentum": {"a": 1}}', r"momentum .* got \{'a': 1\}"),
        ("contrib.prodigy", '{"betas": [{}]}', r"betas .* a list of .* got \[\{\}\]"),
        (
            "contrib.muon",
            '{"ns_coeffs": "x"}',
            "does not accept these .*preset string: x",
        ),
        (
            "contrib.dpsgd",
            '{"seed": 0}',
            r"dpsgd needs l2_norm_clip, noise_multiplier in --optim_args\.",
        ),
        ("contrib.schedule_free", None, "evaluates parameters other than"),
        ("optax.contrib.schedule_free_sgd", None, "evaluates parameters other than"),
        ("lion", '{"mu_dtype": "bf16"}', "does not accept these --optim_args .*'bf16'"),
        ("sm3", None, "does not accept a learning rate schedule"),
        ("MFAC", '{"lr": 1e-4', "--optim_args is not valid JSON"),
        ("MFAC", "lr=1e-4", "--optim_args is not valid JSON"),
        ("MFAC", "[1]", "must be a JSON object"),
        ("MFAC", '{"ngrads": 8}', "unknown key 'ngrads'; MFAC accepts lr, num_grads"),
        ("adamw", '{"damp": 1e-6}', "unknown key 'damp'; adamw accepts lr, b1"),
        ("MFAC", '{"damp": "small"}', "damp in --optim_args must be a positive number"),
        (
            "MFAC",
            '{"lr": true}',
            "lr in --optim_args must be a finite number .* got True",
        ),
        ("MFAC", '{"lr": -1}', "lr in .* got -1"),
        ("MFAC", '{"lr": NaN}', "lr in .* got nan"),
        ("MFAC", '{"num_grads": 0}', "num_grads .* an integer of at least 1, got 0"),
        ("MFAC", '{"num_grads": 8.0}', "num_grads .* must be an integer .* got 8.0"),
        ("MFAC", '{"damp": -1}', "damp .* must be a positive number, got -1"),
        ("MFAC", '{"damp": 0}', "damp .* must be a positive number, got 0"),
        (
            "MFAC",
            '{"window": "sparse"}',
            "window .* one of dense, .* got 'sparse'",
        ),
        ("MFAC", '{"window": ["dense"]}', r"window .* one of .* got \['dense'\]"),
        (
            "MFAC",
            '{"weight_decay": 0.01}',
            "weight_decay 0.01 .* tables dense.*'row_sparse'.* choose dense, bf16",
        ),
        ("MFAC", '{"window": 8}', "window .* one of dense, bf16, int8, .* got 8"),
        ("MFAC", '{"word_lr": -1}', "word_lr .* null or a finite .* got -1"),
        ("MFAC", '{"word_lr": "1e-4"}', "word_lr .* null or .* got '1e-4'"),
        ("MFAC", '{"word_lr": Infinity}', "word_lr .* null or .* got inf"),
        ("adamw", '{"word_lr": true}', "word_lr .* null or .* got True"),
        ("adamw", '{"window": "dense"}', "unknown key 'window'"),
        (
            "adam_mfac",
            '{"momentum": 0.9}',
            "adam_mfac accepts lr, num_grads, damp, b1,",
        ),
        ("MFAC", '{"momentum": 1}', r"momentum .* a number in \[0, 1\), got 1"),
        ("MFAC", '{"weight_decay": -1}', "weight_decay .* got -1"),
        ("adamw", '{"b1": 1.0}', r"b1 .* a number in \[0, 1\), got 1.0"),
        ("adamw", '{"eps": -1e-8}', "eps .* at least 0, got -1e-08"),
        ("adamw", '{"weight_decay": -1}', "weight_decay .* got -1"),
    ],
)
def test_a_bad_hyperparameter_is_named(optim, optim_args, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(args_of(optim, optim_args), 10)


def test_weight_decay_is_rejected_by_an_optimizer_without_it():
    with pytest.raises(UserError, match=r"--weight_decay 0\.1 .*--optim sgd.*has no w"):
        make_optimizer(args_of("sgd", None, "--weight_decay", "0.1"))
    make_optimizer(args_of("sgd", None, "--weight_decay", "0"))


# Name, --optim_args, Optax's function and what else to pass to it.
MASK = {"mask": bert.decay_mask}
DECAY_MASK = {"weight_decay_mask": bert.decay_mask}
ALIASES = [
    ("sgd", {"momentum": 0.9, "nesterov": True}, optax.sgd, {}),
    ("optax.lion", {"b1": 0.8}, optax.lion, {"weight_decay": 0.0, **MASK}),
    ("lion", {"weight_decay": 0.3}, optax.lion, MASK),
    ("optax.adamw", {"mu_dtype": "bfloat16"}, optax.adamw, {"weight_decay": 0, **MASK}),
    ("nadamw", {"weight_decay": 0.1}, optax.nadamw, MASK),
    ("adafactor", {"clipping_threshold": None, "momentum": 0.9}, optax.adafactor, {}),
    ("adafactor", {"weight_decay_rate": 0.1}, optax.adafactor, DECAY_MASK),
    ("lars", {"weight_decay": 0.1}, optax.lars, DECAY_MASK),
    ("novograd", {"weight_decay": 0.1}, optax.novograd, {}),
    ("contrib.prodigy", {"betas": [0.8, 0.9]}, optax.contrib.prodigy, {}),
    ("contrib.dog", {"init_step": ["distance", 0.1]}, optax.contrib.dog, {}),
    ("contrib.muon", {"weight_decay": 0.1}, optax.contrib.muon, DECAY_MASK),
    (
        "optax.contrib.muon",
        {"ns_coeffs": [3.4, -4.7, 2.0], "preconditioning": "aol"},
        optax.contrib.muon,
        {},
    ),
]


@pytest.mark.parametrize(("name", "optim_args", "alias", "ours"), ALIASES)
def test_optax_optimizers_do_what_optax_does(name, optim_args, alias, ours):
    flags = "--max_grad_norm 0.5 --warmup_steps 2 --lr_scheduler_type cosine".split()
    args = args_of(name, json.dumps({"lr": 0.1, **optim_args}), *flags)
    optimizer = make_optimizer(args, 10)
    assert optimizer.name == name
    expected = optax.chain(
        optax.clip_by_global_norm(0.5),
        alias(
            optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10),
            **{
                k: tuple(v) if isinstance(v, list) else v for k, v in optim_args.items()
            },
            **ours,
        ),
    )

    def run(transformation):
        @jax.jit
        def step(params, state):
            gradients = jax.tree.map(jnp.sin, params)
            updates, state = transformation.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params, state = PARAMS, transformation.init(PARAMS)
        for _ in range(3):
            params, state = step(params, state)
        return params

    trained, reference = run(optimizer.transformation), run(expected)
    assert not np.allclose(trained["dense"]["kernel"], PARAMS["dense"]["kernel"])
    for x, y in zip(*map(jax.tree.leaves, (trained, reference)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_hyperparameters_of_an_optax_optimizer():
    args = args_of("contrib.prodigy", '{"lr": 1, "betas": [0.8, 0.9]}')
    assert make_optimizer(args).hyperparams == {
        "lr": 1,
        "betas": [0.8, 0.9],
        "beta3": None,
        "eps": 1e-8,
        "estim_lr0": 1e-6,
        "estim_lr_coef": 1.0,
        "weight_decay": 0.0,
        "safeguard_warmup": False,
    }
    args = args_of("adafactor", None, "--weight_decay", "0.1", "--learning_rate", "1")
    hyperparams = make_optimizer(args).hyperparams
    assert hyperparams["weight_decay_rate"] == 0.1
    assert hyperparams["dtype_momentum"] == "float32"
    assert hyperparams["lr"] == 1
    assert make_optimizer(args_of("lion")).hyperparams["weight_decay"] == 0.0


UNFIT = set(
    "lbfgs optimistic_adam rprop sm3 contrib.dpsgd contrib.galore contrib.momo "
    "contrib.momo_adam contrib.schedule_free contrib.schedule_free_adamw "
    "contrib.schedule_free_sgd contrib.sophia".split()
)


@pytest.mark.filterwarnings("ignore")  # Two of these optimizers warn.
@pytest.mark.parametrize("name", optax_optimizers.aliases())
def test_every_optimizer_of_optax_trains_or_is_rejected(name):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    try:
        optimizer = make_optimizer(args_of(f"optax.{name}"), params=shapes)
    except UserError:
        assert name in UNFIT
        return
    assert name not in UNFIT
    assert json.loads(json.dumps(optimizer.hyperparams)) == optimizer.hyperparams
    init, update = optimizer.transformation
    state = jax.eval_shape(init, shapes)
    updates, new_state = jax.eval_shape(update, shapes, state, shapes)
    # One compilation is enough, and nothing is broadcast.
    assert new_state == state
    assert updates == shapes
    memory.check_memory(optimizer, shapes)


@pytest.mark.filterwarnings("ignore:.seed. is deprecated")  # dpsgd uses it itself.
@pytest.mark.parametrize(
    ("name", "optim_args", "cause"),
    [
        ("contrib.sophia", None, "obj_fn must be provided"),
        ("contrib.momo", None, "missing 1 required keyword-only argument: 'value'"),
        ("lbfgs", None, "value_fn"),
        ("rprop", None, "got <class 'function'>"),
        ("lion", '{"b1": null}', "NoneType"),
        (
            "contrib.dpsgd",
            '{"l2_norm_clip": 1, "noise_multiplier": 1, "seed": 0}',
            "its updates differ in shape from the parameters",
        ),
    ],
)
def test_an_optimizer_that_cannot_take_a_step_is_rejected(name, optim_args, cause):
    message = f"--optim {name} cannot be used here: it needs more than gradients.*"
    # DP-SGD takes the first axis of these shapes for examples.
    with pytest.raises(UserError, match=message + cause):
        make_optimizer(args_of(name, optim_args), params={"kernel": jnp.ones((3, 3))})


EMBEDDINGS = {
    "embeddings": {
        "word_embeddings": {"embedding": jnp.ones((30, 2))},
        "position_embeddings": {"embedding": jnp.ones((16, 2))},
        "token_type_embeddings": {"embedding": jnp.ones((2, 2))},
    },
    "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
}


@pytest.mark.parametrize(
    ("window", "dtype", "rows"),
    [
        (None, "float32", (5, 4)),
        ("row_sparse", "float32", (5, 4)),
        ("row_sparse_bf16", "bfloat16", (5, 4)),
        ("dense", "float32", None),
        ("bf16", "bfloat16", None),
    ],
)
def test_windows_by_name(window, dtype, rows):
    optim_args = {"num_grads": 3} | ({"window": window} if window else {})
    optimizer = make_optimizer(args_of("MFAC", json.dumps(optim_args)))
    state = optimizer.transformation.init(EMBEDDINGS)
    window = optax.tree.get(state, "ScaleByMFACState").window
    assert window["dense/kernel"].values.dtype == dtype
    words, positions, types = (
        window[f"embeddings/{name}_embeddings/embedding"]
        for name in ("word", "position", "token_type")
    )
    assert types.values.shape == (3, 2, 2)
    if rows is None:
        assert words.values.shape == (3, 30, 2)
        assert positions.values.shape == (3, 16, 2)
    else:
        assert words.values.shape == (3, rows[0], 2)
        assert positions.values.shape == (3, rows[1], 2)
        assert words.values.dtype == positions.values.dtype == dtype


@pytest.mark.parametrize("window", ["int8", "topk"])
def test_every_leaf_is_compact(window):
    optimizer = make_optimizer(args_of("MFAC", json.dumps({"window": window})))
    shapes = jax.eval_shape(optimizer.transformation.init, EMBEDDINGS)
    leaves = jax.tree.leaves(optax.tree.get(shapes, "ScaleByMFACState").window)
    assert {leaf.dtype.name for leaf in leaves} == {
        "int8": {"int8", "float32"},
        "topk": {"uint8", "float32"},
    }[window]


@pytest.mark.parametrize(
    ("optim", "hyperparams", "of_words"),
    [
        ("MFAC", {"lr": 1e-2, "num_grads": 2, "window": "dense"}, {}),
        ("adam_mfac", {"num_grads": 2, "window": "dense", "b1": 0.7}, {}),
        ("adamw", {"lr": 1e-2, "b1": 0.8}, {"b1": 0.8}),
    ],
)
def test_word_lr_leaves_the_word_embeddings_to_adamw(optim, hyperparams, of_words):
    """M-FAC's window omits them; both schedules have the same shape."""
    flags = ("--warmup_steps", "2", "--max_grad_norm", "0", "--weight_decay", "0.1")

    def transformation(optim, hyperparams):
        args = args_of(optim, json.dumps(hyperparams), *flags)
        return make_optimizer(args).transformation

    optimizer = transformation(optim, {**hyperparams, "word_lr": 0.3})
    of_words = transformation("adamw", {"lr": 0.3, **of_words})
    of_others = transformation(optim, hyperparams)

    def split(tree):
        tables = dict(tree["embeddings"])
        words = tables.pop("word_embeddings")
        return words, {**tree, "embeddings": tables}

    words, others = split(EMBEDDINGS)
    state = optimizer.init(EMBEDDINGS)
    words_state, others_state = of_words.init(words), of_others.init(others)
    for step in range(4):
        grads = optax.tree.random_like(jax.random.key(step), EMBEDDINGS)
        updates, state = optimizer.update(grads, state, EMBEDDINGS)
        grads_of_words, grads_of_others = split(grads)
        expected = of_words.update(grads_of_words, words_state, words)
        expected_others = of_others.update(grads_of_others, others_state, others)
        words_state, others_state = expected[1], expected_others[1]
        chex.assert_trees_all_close(
            split(updates), (expected[0], expected_others[0]), rtol=1e-6
        )


def test_adamw_without_first_moment_is_rmsprop():
    optimizer = make_optimizer(
        args_of("adamw", '{"lr": 1.0, "b1": 0, "b2": 0, "eps": 0}'), 10
    ).transformation
    gradients = jax.tree.map(lambda x: -0.1 * x, PARAMS)
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, 1.0, rtol=1e-6)


def test_a_window_that_does_not_fit_is_rejected_with_figures(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10**9)
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}}

    def check(num_grads):
        optim_args = json.dumps({"num_grads": num_grads, "window": "dense"})
        optimizer = make_optimizer(args_of("MFAC", optim_args), 10)
        memory.check_memory(optimizer, params)

    check(200)
    with pytest.raises(
        UserError,
        match=r"state of MFAC takes 4\.1 GB .* but 1\.0 GB of memory are available.*"
        r"num_grads = 1024 .* lower num_grads in --optim_args",
    ) as caught:
        check(1024)
    fitting = int(str(caught.value).split(" would fit")[0].split()[-1])
    check(fitting)
    with pytest.raises(UserError):
        check(fitting + 5)


def test_the_suggested_num_grads_of_a_top_k_window_fits(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 10**7)
    params = {"dense": {"kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}}

    def check(num_grads):
        optim_args = json.dumps({"num_grads": num_grads, "window": "topk"})
        memory.check_memory(make_optimizer(args_of("MFAC", optim_args)), params)

    with pytest.raises(UserError, match="would fit") as caught:
        check(512)
    check(int(str(caught.value).split(" would fit")[0].split()[-1]))


def test_available_memory_is_a_plausible_number():
    assert 1e7 < memory.available_memory() < 1e14
