"""Base stage, 16×16, of the model in the box: the whole world of the embedded data, English and Chinese.

Command:   imagen-jax train --config=demo/base16.py --workdir=runs/demo/base --config.data.path=runs/demo/records
Variants:  "" (the whole world from nothing), "pairs" (on records of pairs alone), "further" (the whole world again),
           which go on from one another by --init_from; "smoke" (a minute: only shows that everything runs)
Hardware:  1 core of an AMD EPYC: 45 to 50 pictures a second, 3 hours for all three
"""

import ml_collections

# Steps, peak of the learning rate, shift of the schedule. After the first phase colours and places are right, but which
# of two objects stands where is left to chance: where four of ten pictures have two, the caption's order is worth too
# little. On pairs alone, at higher noise, where that is settled, it is learned; the last phase brings back the rest.
PHASES = {
    "": (8000, 1.5e-3, 0.0),
    "pairs": (4500, 1.2e-3, -2.0),
    "further": (3600, 1.0e-3, -2.0),
    "smoke": (20, 1.5e-3, 0.0),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config; `variant` is "", "pairs", "further" or "smoke"."""
    if variant not in PHASES:
        raise ValueError(f"demo/base16.py has the variants {', '.join(map(repr, PHASES))}, not {variant!r}")
    smoke = variant == "smoke"
    steps, learning_rate, shift = PHASES[variant]
    config = ml_collections.ConfigDict(
        {
            "stage": {
                "name": "base16",
                # Where things are and of which colour; the super-resolution stage draws their shapes.
                "resolution": 16,
                "max_text_length": 36,
                "network": {
                    "kind": "unet",
                    # 2×2 pixels become channels: nothing finer passes the blur of the stage above. So two wide levels,
                    # 8×8 and 4×4, both with the text, cost no more than three narrow ones from 16×16 on.
                    "patch_size": 2,
                    "channels": [16, 32] if smoke else [96, 160],
                    "num_res_blocks": [1, 1] if smoke else [2, 2],
                    # Positions among the keys would take most of the attention from the text at the beginning.
                    "self_attention": [False, False],
                    "text_attention": [True, True],
                    "head_channels": 16 if smoke else 32,
                    "embedding_width": 64 if smoke else 192,
                    "text_width": 96,
                },
                "schedule": {"kind": "cosine", "shift": shift},
                "prediction": "x0",
                "sampling": {
                    "sampler": {"kind": "ddpm", "steps": 8 if smoke else 32},
                    "guidance_weight": 1.5,
                },
            },
            # Nearly clean pictures weigh no more than an SNR of 4 does: what binds is learned at high noise.
            "loss": {"space": "v", "snr_cap": 4.0},
            "optimizer": {"kind": "adam", "learning_rate": learning_rate, "warmup_steps": 200, "b2": 0.99},
            "data": {"path": "records", "batch_size": 8 if smoke else 32, "num_threads": 2},
            "train": {
                "steps": steps,
                "ema_decay": 0.999,
                "log_every": 10 if smoke else 50,
                "checkpoint_every": 10 if smoke else 500,
                "sample_every": 20 if smoke else 2000,
                "sample_count": 16 if smoke else 64,
                "sample_split": "test",
                "eval_every": 0 if smoke else 2000,
            },
        }
    )
    return config
