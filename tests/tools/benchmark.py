"""The runs behind the README's tables, and the tables:

    python tests/tools/benchmark.py phantom --seeds 0 1 2
    python tests/tools/benchmark.py acdc3 --data ../shared/data/acdc --rows labelled-only CPS
    python tests/tools/benchmark.py tables

Runs each row with each seed, two at a time on one thread each. A finished run is left as it is, an
interrupted one goes on, and if one fails the exit status is 1, after the others. Then puts them
into tests/results/SET.csv (a line for each network of each run; what was run elsewhere stays
there), and makes the tables in README.md from these files, between `<!-- table SET -->` and
`<!-- end -->`.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402 - after the path

RESULTS = ROOT / "tests" / "results"
BASE = "labelled-only"
FULL = "all labels"

ROWS = {  # row: file, its options (TWICE: double the steps), passes a step with gradient + others
    BASE: ("mean_teacher.py", ["--supervised"], "1 + 1"),
    "Mean Teacher": ("mean_teacher.py", [], "2 + 2"),
    "CPS": ("cps.py", [], "4 + 2"),
    "UCMT": ("ucmt.py", [], "4 + 1.5"),
    "UCMT, as many batches": ("ucmt.py", ["--steps", "TWICE"], "4 + 1.5"),
    "CDMA": ("cdma.py", [], "2, of 3 decoders"),
    "MLDS": ("mlds.py", [], "2 + 1"),
    "MLDS, half with boxes": ("mlds.py", ["--boxes", "50%"], "2 + 1"),
    "Contrastive": ("contrastive_st.py", [], "2 (first 1)"),
    FULL: ("mean_teacher.py", ["--supervised", "--labeled", "100%"], "1 + 1"),
}
REAL = ["--size", "96", "--width", "16"]
SETS = {  # set: the options of its runs, but --data; DATA stands for its folder
    "phantom": ["--steps", "800"],
    "acdc3": ["--labeled", "DATA/labeled_3.txt", *REAL, "--steps", "3000"],
    "acdc7": ["--labeled", "DATA/labeled_7.txt", *REAL, "--steps", "1500"],
    "acdc7_long": ["--labeled", "DATA/labeled_7.txt", *REAL, "--steps", "3000"],
    "isic": ["--labeled", "5%", *REAL, "--steps", "1500"],
}
COLUMNS = ["row", "seed", "network", "headline", "labeled", "split", "size", "width", "steps",
           "precision", "machine", "torch", "date", "seconds", "best_step"]
COLUMNS += [f"{when}_{metric}" for when in ("last", "best") for metric in common.METRICS]
COLUMNS += ["dice_by_unit"]  # of the last checkpoint, for intervals


def machine():
    """The processor's name, with what it has in hardware for neural networks."""
    has = common.cpu_capabilities()
    words = [common.device_name("cpu")]
    words += [name for name in ("avx2", "avx512_f", "avx512_bf16") if has.get(name)]
    return " ".join(words)


def options_of(name, row):
    """The row's own options in a set."""
    steps = int(SETS[name][SETS[name].index("--steps") + 1])
    return [word.replace("TWICE", str(2 * steps)) for word in ROWS[row][1]]


def folder_of(out):
    """The run's folder in the one for a row and seed; None before its start."""
    found = sorted(out.glob("*/*/args.json"))
    if not found:
        return None
    return found[0].parent


def train(name, row, seed, data, out):
    """One run, unless it is done, to its end; its output goes into a file. -> its exit status."""
    file = ROWS[row][0]
    folder = folder_of(out)
    words = [word.replace("DATA", str(data)) for word in SETS[name]]
    words += [*options_of(name, row), "--seed", str(seed), "--out", str(out)]
    if data is not None:
        words += ["--data", str(data)]
    if folder is not None:
        if (folder / "results.json").exists():
            return 0
        words = ["--resume", str(folder)]
    out.mkdir(parents=True, exist_ok=True)
    print(f"{row}, seed {seed}: {file} {' '.join(words)}", flush=True)
    with open(out / "output.txt", "a") as output:
        done = subprocess.run([sys.executable, str(ROOT / file), *words], stdout=output,
                              stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        print(f"{row}, seed {seed}: status {done.returncode}, see {output.name}", flush=True)
    return done.returncode


def dice_by_unit(results, network):
    """Test Dice of each unit, a patient, say: "p36:71.20 p37:..."; over its volumes and classes."""
    by_unit = {}
    for volume, scores in results["networks"][network]["last"]["volumes"].items():
        dice = [score["dice"] for score in scores.values() if score is not None]
        by_unit.setdefault(results["units"][volume], []).extend(dice)
    words = []
    for unit, dice in sorted(by_unit.items()):
        words.append(f"{unit}:{np.mean(dice):.2f}")
    return " ".join(words)


def lines_of(row, results):
    """The CSV's lines of one run: a dictionary of texts for each network."""
    args = results["args"]
    lines = []
    for network, scores in results["networks"].items():
        line = {"row": row, "seed": results["seed"], "network": network, "headline": "",
                "labeled": results["labeled"], "split": "/".join(results["split"].values()),
                "machine": machine(), "torch": results["torch"], "date": results["date"],
                "seconds": results["seconds"], "best_step": results["best_step"]}
        for setting in ("size", "width", "steps", "precision"):
            line[setting] = args[setting]
        if network == results["headline"]["network"]:
            line["headline"] = "yes"
        for when in ("last", "best"):
            for metric in common.METRICS:
                line[f"{when}_{metric}"] = f"{scores[when][metric]:.4f}"
        line["dice_by_unit"] = dice_by_unit(results, network)
        lines.append({column: str(value) for column, value in line.items()})
    return lines


def write_csv(path, lines):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read_csv(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def order(line):
    return list(ROWS).index(line["row"]), int(line["seed"]), line["headline"] == ""


def collect(name, out):
    """Put the finished runs into tests/results/SET.csv, in the place of older ones."""
    lines = read_csv(RESULTS / f"{name}.csv")
    for row in ROWS:
        for place in sorted((out / name).glob(f"{row}-seed*")):
            folder = folder_of(place)
            if folder is not None and (folder / "results.json").exists():
                results = json.loads((folder / "results.json").read_text())
                run = row, str(results["seed"])
                lines = [line for line in lines if (line["row"], line["seed"]) != run]
                lines += lines_of(row, results)
    write_csv(RESULTS / f"{name}.csv", sorted(lines, key=order))


def dice_of(lines):
    """Lines of some seeds -> Dice (seeds, units, 1), of each unit the mean."""
    rows = []
    for line in lines:
        rows.append([[float(word.rpartition(":")[2])] for word in line["dice_by_unit"].split()])
    return np.array(rows)


def gain_of(lines, base):
    """Gain in Dice over the base with its 95% interval, of the seeds that both have."""
    base_of = {line["seed"]: line for line in base}
    shared = [line for line in lines if line["seed"] in base_of]
    if not shared:
        return ""
    ours, theirs = dice_of(shared), dice_of([base_of[line["seed"]] for line in shared])
    units = np.arange(ours.shape[1])[:, None]  # a unit has one place
    gain, low, high = common.bootstrap_gain(ours, theirs, units)
    return f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"


def table_of(name):
    """The README's table of a set, from its CSV file."""
    lines = read_csv(RESULTS / f"{name}.csv")
    seeds = sorted({line["seed"] for line in lines})
    titles = ["test Dice", *[f"seed {seed}" for seed in seeds], "mean ± sd", "gain (95% interval)",
              "HD95 px", "passes a step", "minutes"]
    table = [titles, ["-"] * len(titles)]
    headlines = [line for line in lines if line["headline"]]
    base = [line for line in headlines if line["row"] == BASE]
    for row, (file, _, passes) in ROWS.items():
        shown = {f"{row}: `{' '.join([file, *options_of(name, row)])}`": headlines}
        if row == BASE:
            shown["the same run, its EMA"] = [line for line in lines if not line["headline"]]
        for title, candidates in shown.items():
            of_row = [line for line in candidates if line["row"] == row]
            if of_row:
                gain = ""
                if of_row != base:
                    gain = gain_of(of_row, base)
                table.append([title, *cells_of(of_row, seeds, gain), passes, minutes_of(of_row)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def cells_of(lines, seeds, gain):
    """Dice of each seed, their mean ± standard deviation, the gain, the mean HD95: texts."""
    by_seed = {line["seed"]: float(line["last_dice"]) for line in lines}
    cells = []
    for seed in seeds:
        cells.append(f"{by_seed[seed]:.1f}" if seed in by_seed else "")
    dice = list(by_seed.values())
    mean = f"{np.mean(dice):.1f}"
    if len(dice) > 1:
        mean += f" ± {np.std(dice, ddof=1):.1f}"
    hd95 = np.mean([float(line["last_hd95"]) for line in lines])
    return [*cells, mean, gain, f"{hd95:.1f}"]


def minutes_of(lines):
    return f"{np.mean([float(line['seconds']) for line in lines]) / 60:.0f}"


def tables_in(text):
    """README's text with each table between its markers made anew."""
    for name in SETS:
        start, end = f"<!-- table {name} -->\n", "<!-- end -->\n"
        if start in text:
            before, _, rest = text.partition(start)
            _, found, after = rest.partition(end)
            assert found, f"no {end} after {start}"
            text = before + start + table_of(name) + "\n" + end + after
    return text


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("set", choices=[*SETS, "tables"])
    p.add_argument("--data", type=Path, help="the dataset's folder, but for the phantom")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    p.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    args = p.parse_args(argv)
    if args.data is None and args.set not in ("phantom", "tables"):
        p.error(f"{args.set} needs --data, the folder of its images and masks")
    statuses = []
    if args.set != "tables":
        jobs = [(row, seed) for seed in args.seeds for row in args.rows]
        with ThreadPoolExecutor(2) as two:
            started = []
            for row, seed in jobs:
                out = args.out.resolve() / args.set / f"{row}-seed{seed}"
                started.append(two.submit(train, args.set, row, seed, args.data, out))
        statuses = [run.result() for run in started]
        collect(args.set, args.out.resolve())
    readme = ROOT / "README.md"
    common.write_aside(readme, tables_in(readme.read_text()), common.write_text)
    if any(statuses):
        sys.exit(1)


if __name__ == "__main__":
    main()
