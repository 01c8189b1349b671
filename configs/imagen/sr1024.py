"""Imagen's super-resolution stage 256×256 → 1024×1024 (arXiv 2205.11487, appendix F.3).

Command:   imagen-jax train --config=imagen/sr1024.py --workdir=runs/sr1024 --config.data.path=RECORDS
Variants:  "" (the paper's, 0.44 B parameters), "v_prediction", "small" (0.05 B, for one host), "debug" (the same
           code path in a minute on a CPU)
Hardware:  the paper: 128 TPU v4 chips. What a step is predicted to take and hold on several slices is in
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
            f"imagen/sr1024.py has the variants {', '.join(map(repr, VARIANTS))}, not {variant!r}"
        )
    config = ml_collections.ConfigDict(
        {
            "stage": {
                "name": "sr1024",
                "resolution": 1024,  # [P]
                "low_resolution": 256,  # [P]
                "crop": 256,  # [P] trained on 64×64 → 256×256 crops
                "max_text_length": 128,  # tokens; DeepFloyd has 77, NeMo 128, imagen-pytorch 256
                "network": {
                    "kind": "efficient_unet",
                    "channels": [128, 256, 512, 1024],  # [P]
                    "num_res_blocks": [2, 4, 8, 8],  # [P]
                    "self_attention": [False, False, False, False],  # [P] none: 64×64 positions in training
                    "text_attention": [False, False, False, True],  # [P]
                    "head_channels": 128,  # [P] 8 heads of 1024 channels
                    "concat_skips": [],  # skips are added: the printed blocks have 0.44 B parameters, the paper 400 M
                    "embedding_width": 512,  # of time and pooled text: 4 × channels[0], as in ADM
                    "text_width": 4096,  # [P] T5-XXL
                    "dtype": "bfloat16",
                    "remat": "products",  # docs/performance.md
                    "gather": "once",
                },
                "schedule": {"kind": "linear"},  # [P] 1000 steps, β from 1e-4 to 0.02
                "prediction": "epsilon",  # [P]
                "augmentation": {
                    "max_level": 1.0,
                    "blur": 0.0,
                },  # [P] aug_level ~ U(0, 1), Gaussian noise only
                "sampling": {
                    "sampler": {"kind": "ddpm", "steps": 128},  # steps as in Imagen Video (arXiv 2210.02303)
                    "guidance_weight": 8.0,  # [P] of the FID run
                    "threshold": {"kind": "dynamic", "percentile": 99.5},  # [P] dynamic; the percentile: 99.5
                    "aug_level": 0.1,  # [P] 0 for the best FID, 0.1 to 0.3 for the best-looking pictures
                },
            },
            "loss": {"space": "epsilon"},  # [P]
            "optimizer": {
                "kind": "adam",  # [P]
                "learning_rate": 1e-4,  # [P]
                "warmup_steps": 10_000,  # [P]
                "decay": "cosine",  # [P]
                "b1": 0.9,  # [P]
                "b2": 0.999,  # [P]
                "eps": 1e-8,  # [P]
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
        # Imagen Video trains its super-resolution stages so: faster, and no shift of colours (arXiv 2210.02303).
        config.stage.prediction = config.loss.space = "v"
    if variant == "small":
        config.stage.network.update(channels=[64, 96, 160, 320], head_channels=64, embedding_width=320)
        config.data.batch_size = 256
    if variant == "debug":
        config.stage.update(resolution=128, low_resolution=32, crop=32, max_text_length=8)
        config.stage.network.update(
            channels=[32, 64],
            num_res_blocks=[1, 2],
            self_attention=[False, False],
            text_attention=[False, True],
            head_channels=32,
            embedding_width=64,
            text_width=64,
        )
        config.stage.sampling.sampler.steps = 4
        config.data.update(batch_size=16, num_threads=2)
        config.train.update(steps=20, log_every=10, checkpoint_every=10, sample_every=0)
    return config
