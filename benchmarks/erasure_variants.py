"""Train and evaluate variants of SAFEMax on an emoji suite; appends to `benchmarks/erasure_variants.jsonl`.

    python -m benchmarks.erasure_variants --suite emoji/bomb --work_dir variants

A variant that is already in the work folder is not trained again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safemax_sd.evaluation.options import EvaluateOptions
from safemax_sd.evaluation.run import evaluate

from safemax_sd.prompts import load_suite
from safemax_sd.train import train
from safemax_sd.training.config import config_class

RESULTS = Path(__file__).with_suffix(".jsonl")
VARIANTS: dict[str, dict[str, Any]] = {
    "λ=0": {"decay_lambda": 0.0},
    "λ=1 (default)": {"decay_lambda": 1.0},
    "λ=2": {"decay_lambda": 2.0},
    "λ=4": {"decay_lambda": 4.0},
    "λ=1, sampled target": {"target": "sampled"},
    "λ=1, target exact at guidance 1": {"target_guidance": 1.0},
    "λ=1, no halting of the empty prompt": {"halt_unconditional": 0.0, "target_guidance": 1.0},
}
COLUMNS = (
    ("forgotten %", "metrics", {"metric": "unlearning_accuracy", "subset": "forget"}),
    ("kept %", "metrics", {"metric": "clip_accuracy", "subset": "retain"}),
    ("neighbours %", "metrics", {"metric": "clip_accuracy", "subset": "neighbours"}),
    ("drift", "metrics", {"metric": "drift", "subset": "retain"}),
    ("FID", "metrics", {"metric": "fid", "subset": "retain"}),
    *((f"std at {w:g}", "sweep", {"metric": "latent_std", "guidance_scale": w}) for w in (1.0, 5.0, 7.5)),
)


def find(report: dict[str, Any], part: str, wanted: dict[str, Any]) -> float:
    """The erased model's value of one measurement."""
    rows = [r for r in report[part] if r["model"] == "erased" and all(r[k] == v for k, v in wanted.items())]
    return float(rows[0]["value"])


def measure(name: str, changes: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one variant, unless it is there, evaluate it and return its row."""
    suite = load_suite(arguments.suite)
    folder = arguments.work_dir / f"{arguments.suite.replace('/', '_')}_{list(VARIANTS).index(name)}_{arguments.seed}"
    if not (folder / "erasure.json").exists():
        config = config_class("safemax")(
            forget_prompts=str(suite.path("forget")),
            retain_prompts=str(suite.path("retain")),
            output_dir=str(folder),
            overwrite_output_dir=True,
            seed=arguments.seed,
            max_train_steps=arguments.max_train_steps,
            **changes,
        )
        train(config)
    options = EvaluateOptions(
        adapter=str(folder),
        suite=arguments.suite,
        num_images=arguments.num_images,
        num_sweep_images=32,
        sweep_guidance_scales=(1.0, 5.0, 7.5),
        sweep_samplers=("ddim",),
    )
    report = json.loads((evaluate(options) / "report.json").read_text(encoding="utf8"))
    values = {column: round(find(report, part, wanted), 4) for column, part, wanted in COLUMNS}
    cost, made = report["adapter"]["cost"], report["provenance"]
    return {"suite": arguments.suite, "variant": name, **values, "steps": cost["steps"], "provenance": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="emoji/bomb")
    parser.add_argument("--work_dir", type=Path, default=Path("variants"))
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--max_train_steps", type=int, default=450)
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = [column for column, _, _ in COLUMNS]
    print(f"| variant | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name in arguments.variants:
        row = measure(name, VARIANTS[name], arguments)
        with RESULTS.open("a", encoding="utf8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"| {name} | {' | '.join(f'{row[column]:.4g}' for column in columns)} |", flush=True)


if __name__ == "__main__":
    main()
