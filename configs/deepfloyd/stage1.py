"""Fine-tuning of DeepFloyd IF's stage I, 64×64 (imagen-jax import deepfloyd).

Command:   imagen-jax train --config=deepfloyd/stage1.py --init_from=MODEL --workdir=runs/stage1
               --config.data.path=RECORDS --config.data.text_encoder=MODEL/text_encoder
Variants:  "" (I-XL, 4.3 B parameters), "l" (0.94 B), "m" (0.37 B), "tiny" (0.9 M, for the embedded data at 16×16)
Hardware:  I-XL holds 16 bytes a parameter for training in float32 with Adam and one average: docs/deepfloyd.md
Expect:    depends on the records

The loss is that of ε on the mean half of the output. The variance half of the last layer gets no gradient and stays
as it is; `--config.stage.sampling.sampler.learned_variance=false` draws without it. Captions are encoded while
training: the embeddings of padding count as text and are not in the records.
"""

import ml_collections

# c0 of the four levels c0·(1, 2, 3, 4).
VARIANTS = {"": 704, "l": 320, "m": 192, "tiny": 32}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; `variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(
            f"deepfloyd/stage1.py has the variants {', '.join(map(repr, VARIANTS))}, not {variant!r}"
        )
    tiny, first = variant == "tiny", VARIANTS[variant]
    schedule = {"kind": "discrete_cosine", "steps": 1000}
    return ml_collections.ConfigDict(
        {
            "stage": {
                "name": "deepfloyd16" if tiny else "deepfloyd64",
                "resolution": 16 if tiny else 64,
                "max_text_length": 77,
                "padded_text": True,
                "network": {
                    "kind": "deepfloyd_unet",
                    "channels": [32, 64] if tiny else [first, 2 * first, 3 * first, 4 * first],
                    "num_res_blocks": [1, 1] if tiny else [3, 3, 3, 3],
                    "self_attention": [False, True] if tiny else [False, True, True, True],
                    "text_attention": [False, True] if tiny else [False, True, True, True],
                    "head_channels": 32 if tiny else 64,
                    "text_width": 96 if tiny else 4096,
                    "learned_variance": True,
                    "text_channels": 64 if tiny else 4 * first,
                    "pool_heads": 4 if tiny else 64,
                    "dtype": "float32" if tiny else "bfloat16",
                    "remat": "none" if tiny else "block",
                },
                "schedule": schedule,
                "prediction": "epsilon",
                "augmentation": {"schedule": schedule},
                "sampling": {
                    "sampler": {
                        "kind": "ddpm",
                        "steps": 50 if tiny else 100,
                        "grid": {"kind": "leading"},
                        "variance_interpolation": 0.0,
                    },
                    "guidance_weight": 3.0 if tiny else 7.0,
                    "threshold": {"kind": "dynamic", "percentile": 95.0, "max_scale": 1.5},
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
