"""Fine-tuning of DeepFloyd IF's stage II, 64×64 → 256×256 (imagen-jax import deepfloyd).

Command:   imagen-jax train --config=deepfloyd/stage2.py --init_from=MODEL --workdir=runs/stage2
               --config.data.path=RECORDS --config.data.text_encoder=MODEL/text_encoder
Variants:  "" (II-L, 1.24 B parameters), "tiny" (0.9 M, for the embedded data, 16×16 → 32×32)
Hardware:  II-L holds 16 bytes a parameter for training in float32 with Adam and one average: docs/deepfloyd.md
Expect:    depends on the records

The low-resolution picture is enlarged before its noise, whose level is drawn uniformly from the 1000 steps. Loss,
variance and captions as in deepfloyd/stage1.py.
"""

import ml_collections

VARIANTS = ("", "tiny")
SCALE = 1.4142271248762552  # of residual sums, as in the published config.json


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; `variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(
            f"deepfloyd/stage2.py has the variants {', '.join(map(repr, VARIANTS))}, not {variant!r}"
        )
    tiny = variant == "tiny"
    schedule = {"kind": "discrete_cosine", "steps": 1000}
    return ml_collections.ConfigDict(
        {
            "stage": {
                "name": "deepfloyd32" if tiny else "deepfloyd256",
                "resolution": 32 if tiny else 256,
                "low_resolution": 16 if tiny else 64,
                "max_text_length": 77,
                "padded_text": True,
                "network": {
                    "kind": "deepfloyd_unet",
                    "channels": [32, 64] if tiny else [160, 320, 640, 960, 1280],
                    "num_res_blocks": [1, 1] if tiny else [2, 2, 3, 5, 5],
                    "self_attention": [False, True] if tiny else [False, False, False, True, True],
                    "text_attention": [False, True] if tiny else [False, False, False, True, True],
                    "head_channels": 32 if tiny else 64,
                    "embedding_width": 128 if tiny else 1280,
                    "text_width": 96 if tiny else 4096,
                    "low_res_channels": 3,
                    "learned_variance": True,
                    "text_channels": 64 if tiny else 1280,
                    "pool_heads": 4 if tiny else 64,
                    "embedding_activation": "gelu",
                    "skip_time_act": True,
                    "block_scale": SCALE,
                    "mid_scale": SCALE,
                    "dtype": "float32" if tiny else "bfloat16",
                    "remat": "none" if tiny else "block",
                },
                "schedule": schedule,
                "prediction": "epsilon",
                "augmentation": {"schedule": schedule, "enlarge": True},
                "sampling": {
                    "sampler": {
                        "kind": "ddpm",
                        "steps": 50,
                        "grid": {"kind": "leading"},
                        "variance_interpolation": 0.0,
                    },
                    "guidance_weight": 4.0,
                    "threshold": {"kind": "dynamic", "percentile": 95.0, "max_scale": 1.0},
                    "aug_level": 0.25,
                },
            },
            "loss": {"space": "epsilon"},
            "optimizer": {
                "kind": "adam",
                "learning_rate": 1e-3 if tiny else 1e-5,
                "warmup_steps": 20 if tiny else 500,
                "decay": "constant",
            },
            "data": {"path": "records", "batch_size": 16 if tiny else 64, "num_threads": 2 if tiny else 16},
            "train": {
                "steps": 200 if tiny else 10_000,
                "text_dropout": 0.1,
                "ema_decay": 0.97 if tiny else 0.9999,
                "log_every": 50,
                "checkpoint_every": 200 if tiny else 1000,
                "sample_every": 0 if tiny else 1000,
            },
        }
    )
