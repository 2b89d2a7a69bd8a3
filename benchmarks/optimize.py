"""Compare the results of ``dsconv.optimize`` for real networks with the closest row of docs/results.md of that size.

    python benchmarks/optimize.py                                      # all networks, several minutes each
    python benchmarks/optimize.py --networks squeezenet1_1 --effective-bits 3.7 --time-limit 3600

It uses the unlabelled images, and is measured on the labelled ones. Networks and images are those of
``benchmarks/accuracy.py``.
"""

import argparse
import json
import time
from typing import Any

import dsconv
from accuracy import BATCH, BUDGET, NETWORKS, ROOT, TITLES
from trained import shared_nets


def best_known(name: str, most: float) -> dict[str, Any]:
    """Return the row of docs/results.md with the least divergence within a number of bits."""
    rows = json.loads((ROOT / "benchmarks" / "accuracy.json").read_text())["networks"][name]
    within = [row for row in rows if row["table"] == "presets" and row["effective_bits"] <= most + 0.005]
    best: dict[str, Any] = min(within, key=lambda row: row["kl"])
    return best


def row(setting: str, bits: float, top1: float, agreement: float, kl: float) -> str:
    """Return a row of the table."""
    return f"| {setting} | {bits:.2f} | {top1:.1f} | {agreement:.1f} | {kl:.4f} |"


def main() -> None:
    """Optimize and measure the networks, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--effective-bits", type=float, default=BUDGET)
    parser.add_argument("--time-limit", type=float, default=600.0, help="seconds for each network")
    arguments = parser.parse_args()
    nets = shared_nets()
    for name in arguments.networks:
        if reason := nets.missing(name):
            print(f"left out: {reason}", flush=True)
            continue
        network, images = nets.load(name), nets.NETS[name][1]
        unlabelled = nets.preprocess(name, nets.images(images, labelled=False)[0])
        used = time.process_time()
        budget = {"effective_bits": arguments.effective_bits}
        found = dsconv.optimize(network, unlabelled, budget=budget, time_limit=arguments.time_limit)
        used = time.process_time() - used
        pictures, labels = nets.images(images)
        x = nets.preprocess(name, pictures)
        batches = [(x[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, len(x), BATCH)]
        measured = dsconv.compare(network, found.model, batches, per_layer=False)
        known = best_known(name, arguments.effective_bits)
        print(f"{TITLES[name]}: {found.seconds:.0f} s, {used:.0f} s of processor time; on {len(x)} labelled images:\n")
        print(found)
        print("| setting | bits | top-1 | agreement | KL |\n|---|---|---|---|---|")
        assert measured.top1 is not None
        assert measured.agreement is not None
        assert measured.kl is not None
        print(row(found.best.name, found.best.effective_bits, measured.top1, measured.agreement, measured.kl))
        figures = (known[figure] for figure in ("effective_bits", "top1", "agreement", "kl"))
        print(row(f"docs/results.md: {known['setting']}", *figures), flush=True)


if __name__ == "__main__":
    main()
