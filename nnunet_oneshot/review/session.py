"""Serve the review page of one dataset until it is stopped."""

from __future__ import annotations

import os
import socket
import webbrowser
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from nnunet_oneshot.dataset import find_raw_folder, open_source
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.output import check_writable
from nnunet_oneshot.review.carry import Carrier
from nnunet_oneshot.review.desk import Desk
from nnunet_oneshot.review.server import Door, make_app
from nnunet_oneshot.review.viewer import niivue_module
from nnunet_oneshot.store import Store, read_manifest
from nnunet_oneshot.training_data import check_labels, preprocessed_folder

try:
    import uvicorn
except ModuleNotFoundError as error:
    raise OneShotError(
        'expected the package uvicorn for the review page, found none; install it: pip install ".[review]" in the clone'
    ) from error

HOST = "127.0.0.1"
DEFAULT_PORT = 8642


@dataclass(frozen=True)
class Reviewed:
    """What stands when the page is closed.

    Attributes:
        dataset: folder name.
        round: the round in force.
        decisions: number of cases by decision: accepted, rejected, corrected, flagged; "none" for the others.
    """

    dataset: str
    round: int
    decisions: dict[str, int]


def review(
    dataset: int | str,
    *,
    port: int = DEFAULT_PORT,
    open_browser: bool = True,
    checkpoint: str = "builtin",
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Reviewed:
    """Serve the page on this machine alone; returns when it is interrupted (Ctrl-C).

    Args:
        dataset: id or name of a dataset that `propagate` or `consensus` made.
        port: to listen on; 0 for any that is free.
        open_browser: open the page in the user's browser.
        checkpoint: SAM2 weights that carry corrected slices.
        device: cpu, cuda or mps.
        say: is told the page's address.

    Raises:
        OneShotError: no manifest, images that are gone, no permission to write decisions, a port that is taken, or the
            extra `review` is not installed.
    """
    desk = open_desk(dataset, checkpoint, device)
    niivue_module()
    with _listening(port) as listening:
        port = listening.getsockname()[1]
        door = Door(port)
        address = f"http://{HOST}:{port}/?token={door.token}"
        say(f"review of {desk.store.folder.name}: {address}\nthe address works once, on this machine; stop with Ctrl-C")
        if open_browser:
            webbrowser.open(address)
        _serve(desk, door, listening)
    return _reviewed(desk)


def open_desk(dataset: int | str, checkpoint: str = "builtin", device: str = "cpu") -> Desk:
    """A dataset ready for review.

    Raises:
        OneShotError: no manifest, cases or label values that the source dataset no longer has, or no permission to
            write decisions.
    """
    folder = find_raw_folder(dataset)
    manifest = read_manifest(folder / "oneshot.json")
    raw = open_source(manifest.source_dataset, folder)
    check_labels(raw, folder)
    if gone := sorted(set(manifest.cases) - {case.name for case in raw.cases}):
        raise OneShotError(f"{folder.name}: expected the images of {gone[0]} in {raw.name}, found none; restore them")
    store = Store(folder, raw.file_ending)
    # Decisions are written to both; nobody is to find at the first one that none can be kept.
    check_writable(store.folder, preprocessed_folder(store))
    return Desk(raw, store, Carrier(checkpoint, device))


def _listening(port: int) -> socket.socket:
    listening = socket.socket()
    if os.name == "posix":
        # A port that was just closed is free; on Windows the same option would let two servers share one.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise OneShotError(
            f"expected to listen on port {port} of this machine, found that impossible ({error}); choose another --port"
        ) from error
    return listening


def _serve(desk: Desk, door: Door, listening: socket.socket) -> None:
    settings = uvicorn.Config(make_app(desk, door), log_level="warning", access_log=False, lifespan="off")
    try:
        uvicorn.Server(settings).run(sockets=[listening])
    except KeyboardInterrupt:
        return


def _reviewed(desk: Desk) -> Reviewed:
    manifest = desk.store.read_manifest()
    decisions: Counter[str] = Counter()
    for record in manifest.cases.values():
        said = record.review or {}
        decisions[said.get("decision") or ("flagged" if said.get("flag") else "none")] += 1
    return Reviewed(desk.store.folder.name, manifest.round, dict(sorted(decisions.items())))
