"""Makes the pictures in docs/images from real runs: `python docs/screenshots.py [--runs FOLDER] [--only first|changed|cycle]`.

Trains the chat model of docs/start/first-fine-tune.md, another one and three classifiers, and sweeps over a fourth (about twenty
minutes on two CPU cores), runs `benchmarks/cycle.py story` (five more), renders their pages, and takes pictures with headless
Chromium. Runs that are already in FOLDER are taken as they are. Needs Chromium and Pillow.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"
MOST_BYTES = 200_000

CHAT = (
    "experiment=quickstart",
    "data.max_length=128",
    "trainer.max_steps=40",
    "evaluate.every=10",
    "evaluate.max_rows=16",
    "evaluate.samples=3",
    "evaluate.max_new_tokens=32",
    "checkpoint.every=20",
    "run.export=none",
)
SENTIMENT = (
    "experiment=sentiment",
    "data.max_rows=2000",
    "data.max_length=64",
    "trainer.max_steps=40",
    "evaluate.every=10",
    "evaluate.max_rows=200",
    "launch.processes=1",
    "run.export=none",
)
RATES = ("3e-5", "1e-4", "3e-4")
SWEEP = (
    *("experiment=sentiment", "method=lora", "run.name=sentiment", "data.max_rows=1000", "data.max_length=64"),
    *("trainer.max_steps=32", "trainer.micro_batch_size=8", "trainer.global_batch_size=16", "run.export=none"),
    *("evaluate.every=4", "evaluate.max_rows=128", "evaluate.at_start=false", "launch.processes=1", "sweep.parallel=2"),
    *("hydra/sweeper=optuna", "sweep.trials=14", "sweep.pruner=asha", "sweep.reduction_factor=2"),
    *("optimizer.lr=tag(log, interval(1e-5, 2e-2))", "method.rank=4,8,16", "schedule=cosine,linear"),
)

CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def dstune(*arguments: str, folder: Path | None = None) -> None:
    """Run the command in `folder`."""
    subprocess.run([sys.executable, "-m", "dstune", *arguments], cwd=folder, check=True)


def first_fine_tune(folder: Path) -> None:
    """The run of docs/start/first-fine-tune.md: its rows, its commands, and the pictures of its pages."""
    folder.mkdir(parents=True, exist_ok=True)
    (fetched,) = json.loads(
        subprocess.run(
            [sys.executable, "-m", "dstune", "samples", "sentiment", "--json"], check=True, capture_output=True
        ).stdout
    )
    with Path(fetched["path"]).open(encoding="utf-8") as lines:
        reviews = [json.loads(line) for line in lines]
    with (folder / "my.jsonl").open("w", encoding="utf-8") as rows:
        for review in reviews[::64][:200]:
            question = f"Is this film review fresh or rotten? {review['text']}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": review["label"]}]
            rows.write(json.dumps({"messages": turns}) + "\n")
    run = folder / "runs" / "first"
    if not (run / "result.json").is_file():
        dstune("init", "my.jsonl", "--force", folder=folder)
        dstune("train", "my.yaml", "run.dir=runs/first", "evaluate.samples=3", folder=folder)
    dstune("report", "runs/first", folder=folder)
    dstune("data", "show", "my.yaml", "--rows", "2", "--html", "rows.html", folder=folder)
    picture(run / "report.html", "first-report", 1280, 1180)
    picture(folder / "rows.html", "first-rows", 1280, 620)


def monitored_and_cycled(folder: Path) -> None:
    """The page of a check that found drift, and that of the cycle which followed."""
    checked, ledger = folder / "first" / "monitor" / "report.html", folder / "cycle" / "report.html"
    if not ledger.is_file():
        program = Path(__file__).parents[1] / "benchmarks" / "cycle.py"
        subprocess.run([sys.executable, program, "story", "--folder", folder], check=True)
    picture(checked, "monitor", 1280, 1180)
    picture(ledger, "cycle", 1280, 1180)


def trained(folder: Path, *overrides: str) -> Path:
    """The run in `folder`, trained with these overrides unless it is there already."""
    if not (folder / "result.json").is_file():
        dstune("train", *overrides, f"run.dir={folder}")
    return folder


def swept(folder: Path) -> Path:
    """The sweep in `folder`; trials that are there are not trained again."""
    dstune("train", "--multirun", *SWEEP, f"sweep.dir={folder}")
    return folder


def picture(page: Path, name: str, width: int, height: int, *, dark: bool = False) -> None:
    """Take `page` in a window of that size; 256 colours are enough for it and keep the repository small."""
    browser = next((path for program in ("chromium", "google-chrome") if (path := shutil.which(program))), None)
    if browser is None:
        sys.exit("Chromium is not installed (Debian: apt-get install chromium)")
    target = IMAGES / f"{name}.png"
    with tempfile.TemporaryDirectory(prefix="dstune-") as profile:
        flags = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={target}"]
        if dark:
            flags.append("--blink-settings=preferredColorScheme=0")
        subprocess.run([browser, *CHROMIUM, *flags, page.resolve().as_uri()], check=True, capture_output=True)
    with Image.open(target) as image:
        few = image.convert("RGB").quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(target, optimize=True)
    size = target.stat().st_size
    print(f"{target}: {width} x {height}, {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        sys.exit(f"{target} is larger than {MOST_BYTES / 1000:.0f} kB")


def picture_of_section(page: Path, section: str, name: str, width: int, height: int) -> None:
    """Take one section of `page` alone, with its first example open."""
    text = page.read_text(encoding="utf-8")
    alone = f"<style>.bar, footer, main > :not(#{section}) {{ display: none }}</style></head>"
    with tempfile.TemporaryDirectory(prefix="dstune-") as folder:
        copy = Path(folder) / page.name
        head, _, body = text.partition(f'<section id="{section}">')
        shown = (
            head.replace("</head>", alone, 1)
            + f'<section id="{section}">'
            + body.replace("<details>", "<details open>", 1)
        )
        copy.write_text(shown, encoding="utf-8")
        picture(copy, name, width, height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/screenshots"), help="default runs/screenshots")
    parser.add_argument("--only", choices=["first", "changed", "cycle"], help="leave out the others")
    arguments = parser.parse_args()
    folder = arguments.runs
    if arguments.only in (None, "changed"):
        run = folder / "safety" / "careless"
        benchmark = IMAGES.parents[1] / "benchmarks" / "safety.py"
        subprocess.run([sys.executable, benchmark, "careless", "--folder", run.parent], check=True)
        dstune("report", str(run))
        picture_of_section(run / "report.html", "changed", "what-changed", 1280, 760)
    if arguments.only in (None, "cycle"):
        monitored_and_cycled(folder / "cycle")
    if arguments.only in (None, "first"):
        first_fine_tune(folder / "first")
    if arguments.only:
        return
    chat = trained(folder / "chat", *CHAT, "run.name=chitchat")
    rates = [
        trained(folder / f"lr-{rate}", *SENTIMENT, f"optimizer.lr={rate}", f"run.name=lr-{rate}") for rate in RATES
    ]
    dstune("report", str(chat))
    dstune("report", *map(str, rates), "--output", str(folder / "compare.html"))
    dstune("data", "show", *CHAT, "--rows", "2", "--html", str(folder / "rows.html"))
    IMAGES.mkdir(exist_ok=True)
    picture(chat / "report.html", "report-desktop", 1280, 1480)
    picture(chat / "report.html", "report-phone", 390, 1500)
    picture(folder / "compare.html", "report-compare-dark", 1280, 1330, dark=True)
    picture(swept(folder / "sentiment" / "sweep") / "report.html", "report-sweep", 1280, 2330)
    picture(folder / "rows.html", "data-show", 1280, 1960)


if __name__ == "__main__":
    main()
