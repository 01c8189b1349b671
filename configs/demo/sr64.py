"""Super-resolution stage, 16×16 → 64×64, of the model in the box.

Command:   imagen-jax train --config=demo/sr64.py --workdir=runs/demo/sr --config.data.path=runs/demo/records
Variants:  "" (from nothing), "further" (goes on from that by --init_from), "smoke" (a minute: only shows that
           everything runs)
Hardware:  1 core of an AMD EPYC: 50 to 60 pictures a second, 3 hours for both
"""

import ml_collections

# Steps, and peak of the learning rate.
PHASES = {"": (10_000, 2e-3), "further": (9000, 1.5e-3), "smoke": (20, 2e-3)}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; `variant` is "", "further" or "smoke"."""
    if variant not in PHASES:
        raise ValueError(f"demo/sr64.py has the variants {', '.join(map(repr, PHASES))}, not {variant!r}")
    smoke = variant == "smoke"
    steps, learning_rate = PHASES[variant]
    config = ml_collections.ConfigDict(
        {
            "stage": {
                "name": "sr64",
                "resolution": 64,
                "low_resolution": 16,
                "max_text_length": 36,
                "network": {
                    "kind": "efficient_unet",
                    # 2×2 pixels become channels; the three levels see 16×16, 8×8 and 4×4.
                    "patch_size": 2,
                    "channels": [16, 16] if smoke else [48, 96, 128],
                    "num_res_blocks": [1, 1] if smoke else [2, 2, 1],
                    "self_attention": [False, True] if smoke else [False, False, False],
                    "text_attention": [False, True] if smoke else [False, True, True],
                    "head_channels": 16 if smoke else 32,
                    "embedding_width": 64 if smoke else 128,
                    "text_width": 96,
                },
                # What is hard is settled at high noise: with some of the edges to be seen, the rest follows.
                "schedule": {"kind": "cosine", "shift": -2.0},
                "prediction": "x0",
                # The base's shapes are often wrong at the scale of a pixel: they are hidden, and drawn from the text.
                "augmentation": {"max_level": 0.2, "blur": 1.5},
                "sampling": {
                    "sampler": {"kind": "ddpm", "steps": 8 if smoke else 24},
                    "guidance_weight": 1.5,
                    "aug_level": 0.1,
                },
            },
            "loss": {"space": "x0"},
            "optimizer": {"kind": "adam", "learning_rate": learning_rate, "warmup_steps": 100, "b2": 0.99},
            "data": {"path": "records", "batch_size": 8 if smoke else 32, "num_threads": 2},
            "train": {
                "steps": steps,
                "ema_decay": 0.999,
                "log_every": 10 if smoke else 50,
                "checkpoint_every": 10 if smoke else 500,
                "sample_every": 20 if smoke else 2000,
                "sample_count": 16 if smoke else 64,
                "sample_split": "test",
                "sample_score": "oracle",
            },
        }
    )
    return config
