"""Size and seconds of the report for many cases, and pictures of the report and the review page in a real browser.

    python benchmarks/pages.py -o WORK --cases 500
    python benchmarks/pages.py -o WORK --cases 12 --pictures docs/pictures

Phantoms (16 x 96 x 96 voxels, four classes, seed 0), labelled by two made-up tools; twelve subjects are repeated to
make up the number. Chromium and its driver are the distribution's, the review page needs the extra `review`.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import uvicorn
from common import use_folders, write_row
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from nnunet_oneshot.consensus import consensus
from nnunet_oneshot.phantom import write_phantom_dataset
from nnunet_oneshot.report import report
from nnunet_oneshot.review.server import Door, make_app
from nnunet_oneshot.review.session import open_desk

SUBJECTS = 12
SHAPE = (16, 96, 96)
SORT = """
const button = [...document.querySelectorAll("th button")].find((b) => b.textContent === arguments[0]);
const begin = performance.now();
button.click();
document.body.offsetHeight;
return [performance.now() - begin, button.closest("table").tBodies[0].rows[0].cells[1].textContent];
"""
WIDE, TALL = (1400, 950), (1240, 1330)
"""Windows in pixels: of the review page, and of the report down to its first contact sheet."""
SWITCHES = (
    "--headless=new",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    f"--window-size={WIDE[0]},{WIDE[1]}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, metavar="WORK", help="working folder")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("-np", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write report.png and review.png there")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    truth = make(arguments.o, arguments.cases, arguments.np)
    row = {"cases": arguments.cases, "shape": SHAPE, "processes": arguments.np, "load_average": os.getloadavg()[0]}
    row |= measure(truth, arguments.np)
    with browser() as driver:
        row |= open_report(driver, Path(row.pop("page")), arguments.pictures)
        if arguments.pictures is not None:
            picture_review(driver, arguments.pictures)
    print(write_row(f"report_{arguments.cases}_cases", row) if arguments.pictures is None else row)


def make(work: Path, cases: int, processes: int) -> Path:
    """Datasets 501 and 601 of that many cases, made once; returns the folder of true labels."""
    truth, raw = work / "truth", Path(os.environ["nnUNet_raw"])
    if (raw / "Dataset601_phantom_oneshot" / "oneshot.json").is_file():
        return truth
    shutil.rmtree(raw, ignore_errors=True)
    shutil.rmtree(truth, ignore_errors=True)
    made = write_phantom_dataset(raw, 501, truth=truth, cases=min(SUBJECTS, cases), shape=SHAPE)
    for number in range(SUBJECTS, cases):
        subject, name = made.cases[number % SUBJECTS], f"phantom_{number + 1:03d}"
        shutil.copy(
            made.folder / "imagesTr" / f"{subject}_0000.nii.gz", made.folder / "imagesTr" / f"{name}_0000.nii.gz"
        )
        shutil.copy(truth / f"{subject}.nii.gz", truth / f"{name}.nii.gz")
    tools = [_tool(work / f"tool_{side}", truth, step) for side, step in (("a", -1), ("b", 1))]
    consensus(501, 601, tools, num_processes=processes)
    return truth


def _tool(folder: Path, truth: Path, step: int) -> Path:
    """Labels that are off by more and more voxels."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, path in enumerate(sorted(truth.iterdir())):
        image = sitk.ReadImage(str(path))
        moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(image), step * (2 + number % 5), axis=2))
        moved.CopyInformation(image)
        sitk.WriteImage(moved, str(folder / path.name))
    return folder


def measure(truth: Path, processes: int) -> dict[str, Any]:
    """Wall and CPU seconds and megabytes of the report, with true labels."""
    begin, busy = time.monotonic(), _cpu_seconds()
    page = report(601, truth=truth, num_processes=processes)
    seconds = {"seconds": round(time.monotonic() - begin, 1), "cpu_seconds": round(_cpu_seconds() - busy, 1)}
    return {"page": str(page), "megabytes": round(page.stat().st_size / 1e6, 2), **seconds}


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium."""
    options = Options()
    options.binary_location = str(shutil.which("chromium") or shutil.which("google-chrome"))
    for switch in (*SWITCHES, *(["--no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(switch)
    with webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options) as driver:
        yield driver


def open_report(driver: webdriver.Chrome, page: Path, pictures: Path | None) -> dict[str, Any]:
    """Seconds to open the page from disk and to sort its table by a press, and what it fetched from elsewhere."""
    begin = time.monotonic()
    driver.get(page.resolve().as_uri())
    opened = time.monotonic() - begin
    if pictures is not None:
        driver.set_window_size(*TALL)
        driver.save_screenshot(str(pictures / "report.png"))
        driver.set_window_size(*WIDE)
    milliseconds, first = driver.execute_script(SORT, "true Dice")
    fetched = driver.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    outside = [name for name in fetched if not name.startswith("data:")]
    rows = driver.execute_script("return [...document.querySelectorAll('table')].pop().tBodies[0].rows.length")
    return {
        "rows": rows,
        "seconds_to_open": round(opened, 2),
        "milliseconds_to_sort": round(milliseconds),
        "first_by_true_dice": first,
        "fetched_from_elsewhere": outside,
    }


def picture_review(driver: webdriver.Chrome, pictures: Path) -> None:
    """The review page as it opens, on the worst case."""
    settings = uvicorn.Config("", host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    listening = settings.bind_socket()
    door = Door(listening.getsockname()[1])
    settings.app = make_app(open_desk(601), door)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    driver.get(f"http://127.0.0.1:{listening.getsockname()[1]}/?token={door.token}")
    while not driver.execute_script("return document.body.dataset.ready"):
        time.sleep(0.1)
    time.sleep(1)  # the last frame is drawn
    driver.save_screenshot(str(pictures / "review.png"))
    server.should_exit = True
    thread.join(20)


if __name__ == "__main__":
    main()
