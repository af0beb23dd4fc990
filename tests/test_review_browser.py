"""The review page in a real browser (headless Chromium): what a person does with mouse and keys arrives on disk."""

# ruff: noqa: E402 (what needs the extra is imported after the skip)
from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_datasets import Roots, label_array, read, write_image
from review_dataset import make_reviewed, record

for package in ("starlette", "uvicorn", "ipyniivue", "selenium"):
    pytest.importorskip(package, reason=f"the browser tests need {package}: pip install -e '.[dev]'")

import uvicorn
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

from nnunet_oneshot.review.server import Door, make_app
from nnunet_oneshot.review.session import open_desk

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver (your distribution's)"
    ),
]
SWITCHES = (
    "--headless=new",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--window-size=1400,1000",
    "--disable-dev-shm-usage",
)
SECONDS = 60


class Page:
    """A tab on the review page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element("id", name)

    def script(self, code: str, *arguments: object) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, f"{what}; the page says {self.message!r}"
            time.sleep(0.1)

    def open(self, address: str) -> Page:
        self.driver.get(address)
        self.until(lambda: self.script("return document.body.dataset.ready"), "ready")
        return self

    @property
    def message(self) -> str:
        return str(self.script("return document.getElementById('message').textContent"))

    def cases(self) -> list[tuple[str, str]]:
        """(case, status) in the list's order."""
        code = "return [...document.querySelectorAll('#cases tr')].map((r) => [r.dataset.case, r.cells[1].textContent])"
        return [(case, status) for case, status in self.script(code)]

    def choose(self, case: str) -> None:
        self.driver.find_element("css selector", f'tr[data-case="{case}"]').click()
        self.until(lambda: self["case-name"].text == case and not self.message, f"{case} shown")

    def press(self, key: str) -> None:
        ActionChains(self.driver).send_keys(key).perform()

    def stroke(self, *moves: tuple[int, int]) -> None:
        """Draw from the middle of the canvas along moves in pixels."""
        pen = ActionChains(self.driver).move_to_element(self["canvas"]).click_and_hold()
        for x, y in moves:
            pen = pen.move_by_offset(x, y).pause(0.05)
        pen.release().perform()


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = str(BROWSER)
    for switch in SWITCHES:
        options.add_argument(switch)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to start as root with it
    with webdriver.Chrome(service=Service(DRIVER), options=options) as started:
        yield started


@pytest.fixture
def folder(roots: Roots, tmp_path: Path) -> Path:
    return make_reviewed(roots, tmp_path)


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """A running server's address, with its token."""
    settings = uvicorn.Config("", host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    listening = settings.bind_socket()
    door = Door(listening.getsockname()[1])
    settings.app = make_app(open_desk(601), door)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token={door.token}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def page(driver: webdriver.Chrome, address: str) -> Iterator[Page]:
    first = driver.current_window_handle
    yield Page(driver).open(address)
    for handle in driver.window_handles:
        if handle != first:
            driver.switch_to.window(handle)
            driver.close()
    driver.switch_to.window(first)
    driver.delete_all_cookies()


def test_list_open_scroll_accept_reload(page: Page, folder: Path) -> None:
    assert [case for case, _ in page.cases()] == ["case_3", "case_2", "case_1", "case_0"]
    assert page["case-name"].text == "case_3", "the worst case is open"
    page.press("j")
    page.until(lambda: page["case-name"].text == "case_2" and not page.message, "the next case")
    before = page["place"].text
    page.press(Keys.ARROW_UP)
    page.until(lambda: page["place"].text not in ("", before), "another slice")
    page.press("a")
    page.until(lambda: record(folder, "case_2")["status"] == "accepted", "accepted on disk")
    page.until(lambda: ("case_2", "accepted") in page.cases(), "accepted in the list")
    page.driver.refresh()
    page.until(lambda: page.script("return document.body.dataset.ready"), "ready again")
    assert ("case_2", "accepted") in page.cases()


def test_reject_flag_comment_and_undo_by_keys(page: Page, folder: Path) -> None:
    page.press("f")
    page.until(lambda: (record(folder, "case_3")["review"] or {}).get("flag"), "flagged")
    page.press("c")
    page.press("too small" + Keys.ESCAPE)
    page.until(lambda: page.script("return document.activeElement === document.body"), "out of the comment")
    page.until(lambda: "written" in page.message, "done")
    page.press("r")
    page.until(lambda: record(folder, "case_3")["status"] == "rejected", "rejected")
    assert record(folder, "case_3")["review"]["comment"] == "too small"
    page.until(lambda: "written" in page.message, "done")
    page.press("u")
    page.until(lambda: record(folder, "case_3")["status"] == "pseudo", "undone")


def test_a_comment_typed_while_a_decision_is_written_stays(page: Page, folder: Path) -> None:
    """The page's own functions, so that the typing falls between the request and its answer."""
    page.script(
        "document.getElementById('flag').click();"
        "const field = document.getElementById('comment'); field.value = 'too small';"
        "field.dispatchEvent(new Event('input'));"
    )
    page.until(lambda: "flag: written" in page.message, "flagged")
    page["reject"].click()
    page.until(lambda: record(folder, "case_3")["status"] == "rejected", "rejected")
    assert record(folder, "case_3")["review"]["comment"] == "too small"


def test_what_is_shown_is_what_is_saved(page: Page, folder: Path) -> None:
    before = read(folder / "pseudoTr" / "fused" / "case_3.nii.gz")
    page["save"].click()
    page.until(lambda: record(folder, "case_3")["status"] == "corrected", "saved")
    assert (read(folder / "labelsTr" / "case_3.nii.gz") == before).all(), "turned and mirrored volumes too"


def test_brush_carry_and_save(page: Page, folder: Path) -> None:
    before = read(folder / "pseudoTr" / "fused" / "case_1.nii.gz")
    page.choose("case_1")
    page.press("v")
    page.press("b")
    page.press("2")
    page.stroke((70, 0), (0, 70), (-70, 0))
    page["carry"].click()
    page.until(lambda: page.message.startswith("carried"), "carried")
    assert "spot" in page.message
    assert record(folder, "case_1")["status"] == "pseudo", "nothing is written yet"
    page.press("a")
    page.until(lambda: "save it as corrected" in page.message, "accepting would throw the work away")
    page["save"].click()
    page.until(lambda: record(folder, "case_1")["status"] == "corrected", "saved")
    after = read(folder / "labelsTr" / "case_1.nii.gz")
    assert (after == 2).sum() > (before == 2).sum()
    assert len(np.flatnonzero((after != before).any(axis=(1, 2)))) > 1, "more slices than the one that was drawn on"


def test_two_tabs_at_once(page: Page, folder: Path, address: str) -> None:
    page.choose("case_1")
    tab = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.open(address.split("?")[0])
    page.choose("case_1")
    page["reject"].click()
    page.until(lambda: record(folder, "case_1")["status"] == "rejected", "rejected in the second tab")
    page.driver.switch_to.window(tab)
    # The first tab still shows what it loaded, unless it has looked since.
    page.script("window.stop()")
    page["accept"].click()
    page.until(lambda: "look at it again" in page.message or "accept" in page.message, "an answer")
    if "look at it again" in page.message:
        assert record(folder, "case_1")["status"] == "rejected"
    page.until(lambda: page.cases()[2][1] != "pseudo", "the list is up to date")


def test_upload_and_its_refusal(page: Page, folder: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "wrong.nii.gz", label_array(3)[:-1])
    page["upload"].send_keys(str(tmp_path / "wrong.nii.gz"))
    page.until(lambda: "expected the shape" in page.message, "refused")
    write_image(tmp_path / "right.nii.gz", label_array(2))
    page["upload"].send_keys(str(tmp_path / "right.nii.gz"))
    page.until(lambda: record(folder, "case_3")["status"] == "corrected", "taken")
    assert (read(folder / "labelsTr" / "case_3.nii.gz") == label_array(2)).all()


def test_files_for_other_programs(page: Page, folder: Path) -> None:
    page["checkout"].click()
    page.until(lambda: page["files"].is_displayed(), "paths")
    assert "itksnap -g" in page["paths"].text
    assert "download label.nii.gz" in page["paths"].text
    page["checkin"].click()
    page.until(lambda: "none that changed" in page.message, "nothing to take back")


def test_nothing_is_fetched_from_elsewhere(page: Page) -> None:
    names = page.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    origin = page.script("return location.origin")
    assert names
    assert [n for n in names if not n.startswith((origin, "blob:", "data:"))] == []
    page.driver.get_log("browser")  # what earlier pages said
    page.choose("case_2")
    assert [said["message"] for said in page.driver.get_log("browser") if said["level"] == "SEVERE"] == []


def test_a_stranger_sees_nothing(driver: webdriver.Chrome, address: str) -> None:
    driver.get(address[:-1] + "x")
    assert "Open this page by the address" in driver.find_element("tag name", "body").text
    driver.get(address)
    driver.delete_all_cookies()
    driver.get(address)
    assert "it works once" in driver.find_element("tag name", "body").text
