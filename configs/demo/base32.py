"""Base stage, 32×32, of the model in the box: the whole world of the embedded data, English and Chinese.

Command:   imagen-jax train --config=demo/base32.py --workdir=runs/demo/base --config.data.path=runs/demo/records
Variants:  "" (full), "smoke" (a minute: only shows that everything runs)
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; `variant` is "" or "smoke"."""
    if variant not in ("", "smoke"):
        raise ValueError(f"demo/base32.py has the variants '' and 'smoke', not {variant!r}")
    smoke = variant == "smoke"
    config = ml_collections.ConfigDict(
        {
            "stage": {
                "name": "base32",
                "resolution": 32,
                "max_text_length": 32,
                "network": {
                    # 2×2 pixels become channels; the three levels see 16×16, 8×8 and 4×4. An Efficient U-Net takes
                    # less time a step, but what a nearly clean picture shows reaches its output badly.
                    "kind": "unet",
                    "patch_size": 2,
                    "channels": [16, 32] if smoke else [48, 96, 128],
                    "num_res_blocks": [1, 1] if smoke else [1, 1, 1],
                    "self_attention": [False, True] if smoke else [False, True, True],
                    "text_attention": [False, True] if smoke else [False, True, True],
                    "head_channels": 16 if smoke else 32,
                    "embedding_width": 64 if smoke else 192,
                    "text_width": 96,
                },
                "schedule": {"kind": "cosine"},
                "prediction": "x0",
                "sampling": {
                    "sampler": {"kind": "ddpm", "steps": 8 if smoke else 32},
                    "guidance_weight": 1.5,
                },
            },
            # Nearly clean pictures weigh no more than an SNR of 4 does: what binds is learned at high noise.
            "loss": {"space": "v", "snr_cap": 4.0},
            "optimizer": {"kind": "adam", "learning_rate": 1.5e-3, "warmup_steps": 200, "b2": 0.99},
            "data": {"path": "records", "batch_size": 8 if smoke else 32, "num_threads": 2},
            "train": {
                "steps": 20 if smoke else 12000,
                "ema_decay": 0.999,
                "log_every": 10 if smoke else 50,
                "checkpoint_every": 10 if smoke else 500,
                "sample_every": 20 if smoke else 2000,
                "sample_count": 16 if smoke else 64,
                "sample_split": "test",
                "sample_score": "oracle",
                "eval_every": 0 if smoke else 2000,
            },
        }
    )
    return config
