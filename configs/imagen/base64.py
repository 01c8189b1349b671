"""Imagen's base stage, text → 64×64 (arXiv 2205.11487, appendix F.1).

Command:   imagen-jax train --config=imagen/base64.py --workdir=runs/base64 --config.data.path=RECORDS
Variants:  "" (the paper's, 2.26 B parameters), "v_prediction", "small" (0.22 B, for one host), "debug" (the same
           code path in a minute on a CPU)
Hardware:  the paper: 256 TPU v4 chips. What a step is predicted to take and hold on several slices is in
           docs/performance.md; `imagen-jax plan` says it for others
Expect:    not trained here

Fields with the mark [P] have the paper's value; the others are choices that it leaves open.
"""

import ml_collections

VARIANTS = ("", "v_prediction", "small", "debug")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; `variant` is one of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(
            f"imagen/base64.py has the variants {', '.join(map(repr, VARIANTS))}, not {variant!r}"
        )
    config = ml_collections.ConfigDict(
        {
            "stage": {
                "name": "base64",
                "resolution": 64,  # [P]
                "max_text_length": 128,  # tokens; DeepFloyd has 77, NeMo 128, imagen-pytorch 256
                "network": {
                    "kind": "unet",
                    "channels": [512, 1024, 1536, 2048],  # [P] embed_dim 512, channel_mult 1, 2, 3, 4
                    "num_res_blocks": [3, 3, 3, 3],  # [P]
                    "self_attention": [False, True, True, True],  # [P] at 32, 16 and 8
                    "text_attention": [False, True, True, True],  # [P] at 32, 16 and 8
                    "head_channels": 64,  # [P] per_head_channels
                    "embedding_width": 2048,  # 4 × channels[0], as in ADM (arXiv 2105.05233)
                    "text_width": 4096,  # [P] T5-XXL
                    "dtype": "bfloat16",
                    "remat": "products",  # docs/performance.md
                    "gather": "once",
                },
                "schedule": {"kind": "cosine"},  # [P]
                "prediction": "epsilon",  # [P]
                "sampling": {
                    "sampler": {"kind": "ddpm", "steps": 256},  # steps as in Imagen Video (arXiv 2210.02303)
                    "guidance_weight": 1.35,  # [P] of the FID run; pictures for people: 5 to 10
                    "threshold": {"kind": "dynamic", "percentile": 99.5},  # [P] dynamic; the percentile: 99.5
                },
            },
            "loss": {"space": "epsilon"},  # [P]
            "optimizer": {
                "kind": "adafactor",  # [P]
                "learning_rate": 1e-4,  # [P]
                "warmup_steps": 10_000,  # [P]
                "decay": "cosine",  # [P]
                "clip_norm": 1.0,
            },
            "data": {"path": "records", "batch_size": 2048},  # [P] the batch
            "train": {
                "steps": 2_500_000,  # [P]
                "text_dropout": 0.1,  # [P]
                "ema_decay": 0.9999,  # as in NeMo
            },
            "mesh": {"data": 1, "fsdp": -1, "fsdp_limit": 32},
        }
    )
    if variant == "v_prediction":
        config.stage.prediction = config.loss.space = "v"
    if variant == "small":
        config.stage.network.update(channels=[160, 320, 448, 640], embedding_width=640)
        config.data.batch_size = 256
    if variant == "debug":
        config.stage.update(resolution=16, max_text_length=8)
        config.stage.network.update(
            channels=[32, 64],
            num_res_blocks=[1, 2],
            self_attention=[False, True],
            text_attention=[False, True],
            head_channels=32,
            embedding_width=64,
            text_width=64,
        )
        config.stage.sampling.sampler.steps = 4
        config.data.update(batch_size=16, num_threads=2)
        config.train.update(steps=20, log_every=10, checkpoint_every=10, sample_every=0)
    return config
