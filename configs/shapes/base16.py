"""Base stage, 16×16, on the embedded captioned data.

Command:   imagen-jax train --config=shapes/base16.py --workdir=runs/base --config.data.path=RECORDS
Variants:  "" (full), "smoke" (a minute: only shows that everything runs)
Hardware:  2 cores of an AMD EPYC, --cpu_devices=2: 110 pictures a second, 12 minutes
Expect:    a loss of 0.05 after 700 steps; with the SR stage, both colours of 96 % and the relation of 98 % of held-out
           captions of two objects are right; shapes are not: the super-resolution stage draws them
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; `variant` is "" or "smoke"."""
    if variant not in ("", "smoke"):
        raise ValueError(f"shapes/base16.py has the variants '' and 'smoke', not {variant!r}")
    smoke = variant == "smoke"
    config = ml_collections.ConfigDict(
        {
            "stage": {
                "name": "base16",
                "resolution": 16,
                "max_text_length": 20,
                "network": {
                    "kind": "unet",
                    # 2×2 pixels become channels: nothing finer passes the blur of the stage above. Two levels, 8×8 and
                    # 4×4, both with the text, cost half of three from 16×16 on.
                    "patch_size": 2,
                    "channels": [16, 32] if smoke else [64, 128],
                    "num_res_blocks": [1, 1] if smoke else [2, 2],
                    "self_attention": [False, True] if smoke else [False, False],
                    "text_attention": [False, True] if smoke else [True, True],
                    "head_channels": 16 if smoke else 32,
                    "embedding_width": 64 if smoke else 128,
                    "text_width": 96,
                },
                # Where things are and which colour is whose is settled at high noise.
                "schedule": {"kind": "cosine", "shift": -2.0},
                "prediction": "x0",
                "sampling": {
                    "sampler": {"kind": "ddpm", "steps": 8 if smoke else 32},
                    "guidance_weight": 1.5,
                },
            },
            "loss": {"space": "v", "snr_cap": 4.0},
            "optimizer": {"kind": "adam", "learning_rate": 2e-3, "warmup_steps": 100, "b2": 0.99},
            "data": {"path": "records", "batch_size": 8 if smoke else 32, "num_threads": 2},
            "train": {
                "steps": 20 if smoke else 2400,
                "ema_decay": 0.995,
                "log_every": 10 if smoke else 50,
                "checkpoint_every": 10 if smoke else 600,
                "sample_every": 20 if smoke else 1200,
                "sample_split": "test",
            },
        }
    )
    return config
