"""Which encoding resolves metres best: read back directly (plan 3 of the study), and in the planner.

Claims are the paper's (tables 4, 5 and E, and its outlook on frequencies).
"""

from spacedrive_jax.config import change, load_config
from spacedrive_jax.study.plan import Claim, Factor, Level, Plan
from spacedrive_jax.study.readout import Readout

DEMO = load_config("demo_published")
SEEDS = (1, 2, 3)

WAVES = tuple(
    Level(f"sincos {base}", {"model.encoder.base": float(base)}) for base in (100, 1000, 10_000, 20_000)
)
ENCODINGS = Factor(
    "encoding",
    (
        *WAVES,
        Level("sincos scene", {"model.encoder.base": 100.0, "model.encoder.frequency_scaling": 0.3}),
        Level("sincos learned", {"model.encoder.learnable_frequencies": True}),
        Level("nerf", {"model.encoder.kind": "nerf", "model.encoder.base": 10.0}),
        Level("fone", {"model.encoder.kind": "fone", "model.encoder.base": 10.0}),
        Level("mlp", {"model.encoder.kind": "mlp"}),
        Level("rotary", {"model.visual_positions": "rotate"}),
    ),
)
"""`sincos scene` is log-spaced closer to the scene: waves of 21 m to 1.7 km instead of 6 m to 80 km."""
READERS = Factor(
    "reader",
    (
        Level("linear", {"model.decoder.kind": "linear"}),
        Level("mlp", {"model.decoder.kind": "mlp"}),
    ),
)
NOISE = Factor("noise", tuple(Level(str(sigma), {"readout.noise": sigma}) for sigma in (0.0, 0.5)))
NOISY = {"noise": "0.5", "reader": "mlp"}


def _reads(better: str, worse: str, where: dict[str, str], text: str, margin: float = 0.25) -> Claim:
    return Claim(text, "error", {"encoding": better, **where}, {"encoding": worse, **where}, margin)


READOUT = Plan(
    name="encodings_readout",
    title="Reading a point back from its encoding",
    base=change(DEMO, "encodings_readout", {"model.encoder.learnable_alpha": False}),
    factors=(ENCODINGS, READERS, NOISE),
    seeds=SEEDS,
    skipped=(
        {"reader": "linear", "noise": "0.5"},
        *(
            {"encoding": level.name, "reader": "linear"}
            for level in ENCODINGS.levels
            if level.name != "sincos 20000"
        ),
    ),
    measure="readout",
    readout=Readout(steps=2000, batch_size=256),
    minutes=0.1,
    claims=(
        _reads(
            "sincos 20000",
            "mlp",
            NOISY,
            "Sin-cos resolves metres better than a learned MLP encoder (table 4)",
        ),
        _reads(
            "sincos 20000", "rotary", NOISY, "Sin-cos resolves metres better than a rotary encoding (table 4)"
        ),
        _reads("sincos 20000", "nerf", NOISY, "Sin-cos resolves metres better than NeRF's waves"),
        _reads("sincos 20000", "fone", NOISY, "Sin-cos resolves metres better than FoNE"),
        _reads(
            "sincos 20000",
            "sincos 1000",
            NOISY,
            "A base of 20,000 resolves metres better than 1,000 (table E)",
        ),
        _reads("sincos 100", "sincos 20000", NOISY, "A base of 100 resolves metres better than 20,000"),
        _reads(
            "sincos scene",
            "sincos 20000",
            NOISY,
            "Waves spaced over the scene beat the paper's set (its outlook)",
        ),
        _reads("sincos learned", "sincos 20000", NOISY, "Learned frequencies beat fixed ones (its outlook)"),
        Claim(
            "Without noise a two-layer reader reads better than a linear one (psi needs its hidden layer)",
            "error",
            {"encoding": "sincos 20000", "reader": "mlp", "noise": "0.0"},
            {"encoding": "sincos 20000", "reader": "linear", "noise": "0.0"},
            0.25,
        ),
    ),
)

ALPHAS = Factor(
    "alpha",
    tuple(
        Level(
            f"{'learned from' if learned else 'fixed'} {alpha}",
            {"model.encoder.alpha": alpha, "model.encoder.learnable_alpha": learned},
        )
        for learned in (False, True)
        for alpha in (1.0, 0.1, 0.02)
    ),
)
ALPHA = Plan(
    name="alpha_readout",
    title="The scale of the encodings: reading a point back under noise",
    base=change(DEMO, "alpha_readout", {}),
    factors=(ALPHAS,),
    seeds=SEEDS,
    measure="readout",
    readout=Readout(steps=2000, batch_size=256, noise=1.0, relative=False),
    minutes=0.1,
    claims=tuple(
        Claim(
            f"Alpha learned from 0.1 reads better than alpha fixed at {fixed} (table 5)",
            "error",
            {"alpha": "learned from 0.1"},
            {"alpha": f"fixed {fixed}"},
            0.25,
        )
        for fixed in ("1.0", "0.1", "0.02")
    ),
    missing=(
        "a limit on alpha, as the language model's own features set one: here none speaks against more",
    ),
)

PLANS = (READOUT, ALPHA)
