"""The review page's server: who is let in, what is answered, and that decisions arrive on disk."""

# ruff: noqa: E402 (what needs the extra is imported after the skip)
from __future__ import annotations

import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from conftest import Answer
from raw_datasets import LABELS, Roots, label_array, read
from review_dataset import make_reviewed, record

for package in ("starlette", "uvicorn", "ipyniivue", "httpx2"):
    pytest.importorskip(package, reason=f"the review page needs {package}: pip install -e '.[dev,review]'")

from starlette.testclient import TestClient

from nnunet_oneshot import cli
from nnunet_oneshot.review.desk import score_of, worst_first
from nnunet_oneshot.review.server import Door, make_app
from nnunet_oneshot.review.session import open_desk
from nnunet_oneshot.review.viewer import niivue_module, with_niivue_exported
from nnunet_oneshot.store import CaseRecord

PORT = 4711
BASE = f"http://127.0.0.1:{PORT}"
Client = TestClient


@pytest.fixture
def folder(roots: Roots, tmp_path: Path) -> Path:
    return make_reviewed(roots, tmp_path)


def stranger(door: Door, base: str = BASE) -> Client:
    """A browser that has no cookie."""
    return TestClient(make_app(open_desk(601), door), base_url=base, follow_redirects=True)


@pytest.fixture
def page(folder: Path) -> Client:
    """A browser that came by the address."""
    door = Door(PORT)
    client = stranger(door)
    assert client.get("/", params={"token": door.token}).status_code == 200
    return client


def nifti(answer: Any) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(answer.content))


def as_file(label: np.ndarray, like: nibabel.Nifti1Image) -> bytes:
    return nibabel.Nifti1Image(label.astype(np.uint8).transpose(), like.affine).to_bytes()


def test_what_a_model_alone_labelled_comes_before_labels_of_low_quality() -> None:
    """It agrees with itself, rightly or not: what is estimated of it in later rounds is no reason to look later."""
    seen = {"views": ["registration/identity"], "divergence": 0.1}
    cases = {
        "drawn": CaseRecord(status="annotated"),
        "good": CaseRecord(status="pseudo", quality={"mean": 0.9}, **seen),
        "bad": CaseRecord(status="pseudo", quality={"mean": 0.2}, **seen),
        "alone": CaseRecord(status="pseudo", round=2, divergence=0.0, quality={"mean": 0.99}),
    }
    assert worst_first(cases) == ["alone", "bad", "good", "drawn"]
    assert score_of(cases["alone"]) is None


def test_only_the_address_with_the_token_opens_the_page(folder: Path) -> None:
    door = Door(PORT)
    client = stranger(door)
    for path in (
        "/",
        "/api/dataset",
        "/niivue.js",
        "/review.js",
        "/?token=",
        "/?token=wrong",
        f"/?token={door.token}x",
    ):
        assert client.get(path).status_code == 403, path
    assert client.post("/api/cases/case_1/decision", json={"action": "accept"}).status_code == 403
    answer = client.get("/", params={"token": door.token}, follow_redirects=False)
    assert answer.status_code == 303
    assert "token" not in answer.headers["location"]
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert client.get("/").status_code == 200
    assert client.get("/api/dataset").status_code == 200


def test_the_token_works_once(folder: Path) -> None:
    door = Door(PORT)
    assert stranger(door).get("/", params={"token": door.token}).status_code == 200
    assert stranger(door).get("/", params={"token": door.token}).status_code == 403
    other = stranger(door)
    other.cookies.set(f"nnunet_oneshot_{PORT}", "guessed")
    assert other.get("/").status_code == 403


def test_another_page_of_this_machine_cannot_decide(page: Client, folder: Path) -> None:
    for origin in ("http://127.0.0.1:9999", "http://evil.example", "null"):
        answer = page.post("/api/cases/case_1/decision", json={"action": "accept"}, headers={"Origin": origin})
        assert answer.status_code == 403, origin
    assert record(folder, "case_1")["status"] == "pseudo"
    answer = page.post("/api/cases/case_1/decision", json={"action": "accept"}, headers={"Origin": BASE})
    assert answer.status_code == 200


def test_another_name_for_this_machine_is_refused(page: Client) -> None:
    assert page.get("/api/dataset", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page/index.html",
        "/review.js/../server.py",
        "/api/cases/..%2f..%2foneshot/label.nii.gz",
        "/api/cases/%2e%2e/label.nii.gz",
        "/api/cases/..%5c..%5coneshot/image.nii.gz",
        "/api/cases//image.nii.gz",
        "/api/cases/case_1/..%2f..%2foneshot.json",
    ],
)
def test_no_path_leads_out(page: Client, path: str) -> None:
    answer = page.get(path)
    assert answer.status_code == 404, path
    assert "root:" not in answer.text


def test_nothing_from_outside(page: Client) -> None:
    answer = page.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    for name in ("/", "/review.js", "/review.css"):
        assert not re.search(r"https?:|//[a-z]", page.get(name).text.replace("// ", "")), name
    assert b"as Niivue" in page.get("/niivue.js").content


def test_list_is_worst_first(page: Client, folder: Path) -> None:
    shown = page.get("/api/dataset").json()
    assert [case["name"] for case in shown["cases"]] == ["case_3", "case_2", "case_1", "case_0"]
    scores = [case["score"] for case in shown["cases"] if case["score"] is not None]
    assert scores == sorted(scores)
    assert shown["cases"][0]["score"] == pytest.approx(record(folder, "case_3")["quality"]["mean"])
    manifest = json.loads((folder / "oneshot.json").read_text())
    manifest["cases"]["case_1"]["quality"] = {"mean": 0.2}
    manifest["cases"]["case_2"] |= {"status": "failed", "reason": "no overlap"}
    (folder / "oneshot.json").write_text(json.dumps(manifest))
    shown = page.get("/api/dataset").json()
    assert [case["name"] for case in shown["cases"]] == ["case_2", "case_1", "case_3", "case_0"]
    assert [c["name"] for c in shown["classes"]] == ["organ", "spot"]
    assert set(shown["statuses"]) >= {c["status"] for c in shown["cases"]}, "each is explained"
    assert "OneShotTrainer learns the best guess there" in shown["divergence_meaning"]


def test_a_low_estimate_names_the_class(page: Client, folder: Path) -> None:
    manifest = json.loads((folder / "oneshot.json").read_text(encoding="utf-8"))
    manifest["cases"]["case_1"]["quality"] = {"mean": 0.5, "1": 0.9, "2": 0.1}
    (folder / "oneshot.json").write_text(json.dumps(manifest), encoding="utf-8")
    reasons = {case["name"]: case["reason"] for case in page.get("/api/dataset").json()["cases"]}
    assert reasons["case_1"] == "estimated Dice 0.50, lowest for spot: 0.10"


def test_a_rejected_label_is_not_hidden_by_divergence(page: Client, folder: Path) -> None:
    """All of it is ignored in training; a tint over the whole volume would hide what was rejected."""
    assert page.post("/api/cases/case_2/decision", json={"action": "reject"}).status_code == 200
    assert (read(folder / "labelsTr" / "case_2.nii.gz") == 3).all()
    assert not np.asanyarray(nifti(page.get("/api/cases/case_2/divergence.nii.gz")).dataobj).any()


def test_volumes_have_the_images_geometry(page: Client, folder: Path, roots: Roots) -> None:
    image = nifti(page.get("/api/cases/case_2/image.nii.gz"))
    stored = nibabel.load(roots.raw / "Dataset501_toy" / "imagesTr" / "case_2_0000.nii.gz")
    assert np.allclose(image.affine, stored.affine, atol=1e-4)
    assert (np.asanyarray(image.dataobj) == np.asanyarray(stored.dataobj)).all()
    label = nifti(page.get("/api/cases/case_2/label.nii.gz"))
    assert (read(folder / "pseudoTr" / "fused" / "case_2.nii.gz") == np.asanyarray(label.dataobj).T).all()
    divergence = nifti(page.get("/api/cases/case_2/divergence.nii.gz"))
    assert ((read(folder / "labelsTr" / "case_2.nii.gz") == 3) == np.asanyarray(divergence.dataobj).T).all()
    assert page.get("/api/cases/case_2/sheet.jpg").content[:2] == b"\xff\xd8"


def test_decisions_arrive_on_disk(page: Client, folder: Path) -> None:
    answer = page.post("/api/cases/case_2/decision", json={"action": "reject", "comment": "blurred"})
    assert answer.status_code == 200
    assert answer.json()["status"] == record(folder, "case_2")["status"] == "rejected"
    again = page.post("/api/cases/case_2/decision", json={"action": "accept"})
    assert again.status_code == 409
    assert again.json()["conflict"] is True
    seen = answer.json()["review"]["time"]
    assert page.post("/api/cases/case_2/decision", json={"action": "accept", "seen": seen}).status_code == 200
    assert record(folder, "case_2")["review"]["comment"] == "blurred"


@pytest.mark.parametrize("body", ["{}", "[]", "nonsense", '{"action": "delete"}', '{"action": "flag", "comment": 3}'])
def test_a_decision_that_is_none_is_refused(page: Client, folder: Path, body: str) -> None:
    answer = page.post("/api/cases/case_2/decision", content=body)
    assert answer.status_code == 409
    assert "expected a decision" in answer.json()["error"]
    assert record(folder, "case_2")["review"] is None


def test_unknown_case(page: Client) -> None:
    assert page.post("/api/cases/nobody/decision", json={"action": "accept"}).status_code == 404
    assert page.get("/api/cases/nobody/image.nii.gz").status_code == 404


def test_a_corrected_label_is_taken(page: Client, folder: Path) -> None:
    shown = nifti(page.get("/api/cases/case_2/label.nii.gz"))
    drawn = np.roll(label_array(2), 1, axis=1)
    answer = page.put("/api/cases/case_2/label", params={"name": "drawing.nii"}, content=as_file(drawn, shown))
    assert answer.status_code == 200, answer.text
    assert (read(folder / "labelsTr" / "case_2.nii.gz") == drawn).all()
    assert record(folder, "case_2")["status"] == "corrected"


def test_a_wrong_upload_changes_nothing(page: Client, folder: Path) -> None:
    shown = nifti(page.get("/api/cases/case_2/label.nii.gz"))
    moved = nibabel.Nifti1Image(label_array(2).transpose(), shown.affine + np.eye(4)).to_bytes()
    for content in (moved, b"", b"x" * 100, b"\0" * (2 << 20)):
        answer = page.put("/api/cases/case_2/label", params={"name": "label.nii"}, content=content)
        assert answer.status_code == 409, answer.text
        assert "expected" in answer.json()["error"]
    assert record(folder, "case_2")["status"] == "pseudo"


def test_files_there_and_back(page: Client, folder: Path) -> None:
    files = page.post("/api/cases/case_2/checkout").json()
    assert Path(files["label"]).parent == folder / "review" / "case_2"
    answer = page.post("/api/cases/case_2/checkin")
    assert (answer.status_code, "none that changed" in answer.json()["error"]) == (409, True)
    shown = nifti(page.get("/api/cases/case_2/label.nii.gz"))
    Path(files["label"]).write_bytes(gzip.compress(as_file(label_array(3), shown)))
    assert page.post("/api/cases/case_2/checkin").json()["status"] == "corrected"
    assert (read(folder / "labelsTr" / "case_2.nii.gz") == label_array(3)).all()


def test_a_correction_is_carried_and_only_then_saved(page: Client, folder: Path) -> None:
    shown = nifti(page.get("/api/cases/case_3/label.nii.gz"))
    label = np.asanyarray(shown.dataobj).T.copy()
    label[2] = np.roll(label[2], 1, axis=0)
    first = page.post("/api/cases/case_3/carry", content=as_file(label, shown))
    assert first.status_code == 200, first.text
    assert first.headers["x-carried"] == "carried organ, spot from z = 3"
    carried = np.asanyarray(nifti(first).dataobj).T.copy()
    assert (carried[2] == label[2]).all()
    assert record(folder, "case_3")["status"] == "pseudo", "nothing is written before a person has looked"
    carried[4] = np.roll(label[2], 2, axis=0)
    query = {"offer": first.headers["x-offer"], "reach": "1"}
    second = page.post("/api/cases/case_3/carry", params=query, content=as_file(carried, shown))
    assert second.headers["x-carried"] == "carried organ, spot from z = 3, 5"
    for bad in ({"reach": "-1"}, {"reach": "x"}):
        assert page.post("/api/cases/case_3/carry", params=bad, content=as_file(label, shown)).status_code == 409


def test_pictures_are_shown_in_colour(roots: Roots, tmp_path: Path) -> None:
    make_reviewed(roots, tmp_path, ending=".png", channels=3)
    door = Door(PORT)
    page = stranger(door)
    page.get("/", params={"token": door.token})
    image = nifti(page.get("/api/cases/case_1/image.nii.gz"))
    stored = read(roots.raw / "Dataset501_toy" / "imagesTr" / "case_1_0000.png")
    shown = np.asanyarray(image.dataobj)
    assert shown.dtype.names == ("R", "G", "B")
    assert (stored[..., 1] == shown["G"][..., 0].T).all()
    assert page.get("/api/dataset").json()["flat"] is True


def test_every_niivue_bundle_is_checked() -> None:
    assert niivue_module().rstrip().endswith(b"as Niivue};")
    for bundle in ("", "export{a as default};", 'console.log("Creating new Niivue instance");x=new Y(1)'):
        assert with_niivue_exported(bundle) is None


def test_before_any_round(roots: Roots, toy: Path, call: Callable[..., Answer]) -> None:
    answer = call(cli.review, "-d", 501, "--no_browser", "-device", "cpu")
    assert answer.code == 2
    assert "nnUNetv2_oneshot_propagate" in answer.error
    assert call(cli.review, "-d", 999, "--no_browser", "-device", "cpu").code == 2


def test_images_whose_dataset_was_renamed(folder: Path, roots: Roots, call: Callable[..., Answer]) -> None:
    (roots.raw / "Dataset501_toy").rename(roots.raw / "Dataset501_real")
    answer = call(cli.review, "-d", 601, "--no_browser")
    assert answer.code == 2
    assert "expected Dataset501_toy, the dataset whose images it labels" in answer.error
    assert "found Dataset501_real; put it back" in answer.error


def test_port_that_is_taken(folder: Path, call: Callable[..., Answer]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        answer = call(cli.review, "-d", 601, "--no_browser", "-device", "cpu", "--port", taken.getsockname()[1])
    assert answer.code == 2
    assert "choose another --port" in answer.error
    assert call(cli.review, "-d", 601, "--no_browser", "-device", "cpu", "--port", 70000).code == 2


@pytest.mark.slow
def test_missing_extra_is_named(folder: Path) -> None:
    code = "import sys; sys.modules['starlette'] = None; from nnunet_oneshot import cli; cli.review()"
    command = [sys.executable, "-c", code, "-d", "601", "--no_browser", "-device", "cpu"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert 'pip install ".[review]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(folder: Path) -> None:
    code = "from nnunet_oneshot import cli; cli.review()"
    command = [sys.executable, "-c", code, "-d", "601", "--no_browser", "-device", "cpu", "--port", "0", "-json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as server:
        assert server.stderr is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", server.stderr.readline())
        assert address
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert b"review.js" in opener.open(address.group(), timeout=20).read()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address.group(), timeout=20)
        refused.value.close()
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
    assert server.returncode == 0, err
    assert json.loads(out)["decisions"] == {"none": len(LABELS) + 1}
