"""Label every image of a folder: `python predict.py INPUT OUTPUT`. Needs nnU-Net and the folder `model` beside it.

Input files are CASE_0000.EXT, CASE_0001.EXT, ... as nnU-Net names channels, or one file a case of any other name.
Output files are CASE.EXT, on the grid of the image.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.postprocessing.remove_connected_components import load_postprocess_save

MODEL = Path(__file__).resolve().parent / "model"
POSTPROCESSING = MODEL / "postprocessing.pkl"
"""Which structures are one piece, where that is known: nnU-Net's own file, written where the model was trained."""


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    if len(arguments) != 2:
        return _fail("expected two folders: python predict.py INPUT OUTPUT")
    source, target = (Path(a) for a in arguments)
    ending = json.loads((MODEL / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    cases = find_cases(source, ending) if source.is_dir() else {}
    if not cases:
        return _fail(f"expected images *{ending} in {source}, found none")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        predict(cases, Path(folder))
        for case in cases:
            shutil.copyfile(Path(folder) / (case + ending), target / (case + ending))
    return 0


def find_cases(source: Path, ending: str) -> dict[str, list[Path]]:
    """Channel files of each case, in order."""
    files = sorted(p for p in source.iterdir() if p.name.endswith(ending))
    channels: dict[str, list[Path]] = {}
    for path in files:
        match = re.fullmatch(r"(.+)_(\d{4})", path.name[: -len(ending)])
        if match is None or int(match.group(2)) != len(channels.setdefault(match.group(1), [])):
            # Names that do not count up from 0000 are no channels: dates and patient numbers end in four digits too.
            return {p.name[: -len(ending)]: [p] for p in files}
        channels[match.group(1)].append(path)
    return channels


def predict(cases: dict[str, list[Path]], target: Path) -> None:
    """Predict without worker processes: a container's shared memory is often too small for them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
    folds = tuple(sorted(p.name[len("fold_") :] for p in MODEL.glob("fold_*")))
    predictor.initialize_from_trained_model_folder(str(MODEL), folds, "checkpoint_final.pth")
    inputs = [[str(p) for p in files] for files in cases.values()]
    predictor.predict_from_files_sequential(inputs, [str(target / case) for case in cases])
    if POSTPROCESSING.is_file():
        functions, arguments = pickle.loads(POSTPROCESSING.read_bytes())
        reader = predictor.plans_manager.image_reader_writer_class()
        for case in cases:
            path = str(target / (case + predictor.dataset_json["file_ending"]))
            load_postprocess_save(path, path, reader, functions, arguments)


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
