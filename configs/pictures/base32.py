"""Base stage, 32×32, on a few thousand captioned pictures of your own.

Command:   imagen-jax train --config=pictures/base32.py --workdir=runs/base --config.data.path=RECORDS
Hardware:  1 core of an AMD EPYC: 45 pictures a second, 63 minutes for 3,438 emoji, a busy second core beside it
Expect:    there, a loss of 0.14 after 550 steps, 0.09 after 2,050 and 0.06 at the end. With sr128 after 800 steps,
           66 % of 64 samples are nearest to their own caption's picture (`benchmarks/nearest.py`; chance 1.6 %)
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; it has no variants."""
    if variant:
        raise ValueError(f"pictures/base32.py has no variants, got {variant!r}")
    return ml_collections.ConfigDict(
        {
            "stage": {
                "name": "base32",
                "resolution": 32,
                "max_text_length": 24,
                "network": {
                    "kind": "unet",
                    "patch_size": 2,
                    "channels": [32, 64, 128],
                    "num_res_blocks": [1, 1, 2],
                    "self_attention": [False, False, True],
                    "text_attention": [False, True, True],
                    "head_channels": 32,
                    "embedding_width": 256,
                },
                "schedule": {"kind": "cosine"},
                "prediction": "x0",
                "sampling": {"sampler": {"kind": "ddpm", "steps": 64}, "guidance_weight": 2.0},
            },
            "loss": {"space": "v", "snr_cap": 10.0},
            "optimizer": {"kind": "adam", "learning_rate": 1e-3, "warmup_steps": 200, "b2": 0.99},
            "data": {"path": "records", "batch_size": 32, "num_threads": 2},
            "train": {
                "steps": 5000,
                "ema_decay": 0.998,
                "log_every": 50,
                "checkpoint_every": 1000,
                "sample_every": 1000,
            },
        }
    )
