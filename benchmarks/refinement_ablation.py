"""What each part of a round gives: out-of-fold labels, fusion, warm start, gating, on the same labels of round 0.

    python benchmarks/refinement_ablation.py --set hippocampus --cases 26 -c 3d_fullres --epochs 10 -o WORK [--spoil]

Rows of labels are scored on the un-annotated pool cases, rows of models on the test cases, by mean foreground Dice:

    labels: before           round 0, as `propagate` makes them by default
            model            what one model says that was trained on all of them
            model_labels, model_views  the same, fused with the labels before, or with every propagator's views
            model_opinion    the model and SAM2's opinion, fused
            one              what `refine` makes of it by default: these and the labels before, fused (where SAM2 did
                             not look along planes, and so gives no opinion, the model's word)
            folds            as `one`, each case by the one of two models that was not trained on its label
            ensemble         what both of these models say together
            two, three       rounds 2 and 3 of `refine`, each by a model of the labels before, from new weights
    models: round_0          trained on round 0's labels
            ungated          the same, with the cases of an estimated Dice below 0.3, which all rows but this leave out
            gated_more       the same, without those below 0.6
            scratch, warm    trained on the labels `one`: from new weights, or from all of those of round_0
            warm_new_head    the same, as nnU-Net's -pretrained_weights has it: its last layers are new
            from_folds       trained on the labels `folds`, from new weights

Trainings are short (`--epochs` of the preset `small`) and seeded; those of round 0 and of `scratch` differ in labels
alone. With --spoil half of the un-annotated images are inverted, gamma-changed or made noisy before anything is done
(the test images are not), which is what gating is for; only `before`, round_0, ungated and gated_more are made then.
Nothing but the scores, and WORK/pictures, sees a true label. Finished rows are small JSON files, and are not made
again: those that do not name the `voices` of a round are of one in which the labels before had none (`one` apart, which
was fused for itself).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import GATED, lay_out, markdown, read_row, use_folders, write_row
from evidence_pictures import draw_cases
from in_process import Weights, make, predict
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from quality import spoil
from trainer_ablation import LABELLED, POOL, PRESET, Ablation, add_data_arguments, difference

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.evaluate import FOREGROUND, evaluate
from nnunet_oneshot.first_round import take_over
from nnunet_oneshot.metrics import METRICS
from nnunet_oneshot.nnunet import Fold
from nnunet_oneshot.prompting import carried_views
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine import open_store
from nnunet_oneshot.refresh import note_preprocessed, raw_label_hashes, refresh
from nnunet_oneshot.relabel import Trust, relabel
from nnunet_oneshot.rounds import kept_manifest
from nnunet_oneshot.second_opinion import AS_BEFORE, ask_sam2, opinion_of, source_of
from nnunet_oneshot.store import LEFT_OUT, Store
from nnunet_oneshot.training_data import splits, write_training_files
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import LabelVolume

FOLDED, UNGATED, GATED_MORE = 611, 612, 613
"""Copies of the labelled dataset: whose round is made by two folds, of which no case is left out, and more are."""
LEAST = {UNGATED: 0.0, GATED_MORE: 0.6}
"""Estimated Dice below which a case is left out, where it is not GATED."""
FOLDS = 2
LABELS = ("before", "model", "model_labels", "model_views", "model_opinion", "one", "folds", "ensemble")
MODELS = ("round_0", "ungated", "gated_more", "scratch", "warm", "warm_new_head", "from_folds")
LATER = ("two", "three")
"""Labels too, made last: a model is trained on the labels in force."""
TRAINED_ON = {"scratch": 1, "warm": 1, "warm_new_head": 1, "from_folds": 1, "again": 2}
"""The round whose labels a model learns, 0 where not named."""
COPIES = {"ungated": UNGATED, "gated_more": GATED_MORE, "from_folds": FOLDED}
"""The dataset that a model learns, LABELLED where not named."""
SPOILED = ("before", "round_0", "ungated", "gated_more")


class Rounds(Ablation):
    """One data set, one annotated case, one budget, one seed."""

    prefix = "refinement_ablation"

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        super().__init__(arguments, seed)
        self.spoiled: bool = arguments.spoil
        self.variant = "_spoiled" if self.spoiled else ""

    def prepare(self) -> None:
        """Labels of round 0, copies of them, and nnU-Net's preprocessing of each."""
        self._claim()
        folder = lay_out(self.data, POOL, self.pool, [self.annotated])
        self.dataset_json = folder / "dataset.json"
        if self.spoiled and not (self.work / "spoiled.json").is_file():
            self._spoil(folder / "imagesTr")
        if not list(nnunet.root("nnUNet_raw").glob(f"Dataset{LABELLED}_*/oneshot.json")):
            propagate(POOL, LABELLED, num_processes=1)
        copies = (UNGATED, GATED_MORE) if self.spoiled else (FOLDED, UNGATED, GATED_MORE)
        for number in copies:
            self._copy(number)
        for number in (LABELLED, *copies):
            store, raw = open_store(number)
            take_over(raw, store, 1, LEAST.get(number, GATED))
            if number == FOLDED:
                _deal(store, raw)
            # Noted once: labels of a later round may have been put in force since.
            if not nnunet.is_preprocessed(number, PRESET.plans, self.configuration):
                labels = raw_label_hashes(number)
                nnunet.plan_and_preprocess(number, PRESET, [self.configuration], 1)
                note_preprocessed(number, PRESET.plans, [self.configuration], labels)

    @property
    def settings(self) -> dict[str, Any]:
        """What all rows of a working folder share."""
        about = {"set": self.data.name, "annotated": self.annotated, "configuration": self.configuration}
        about |= {"epochs": self.epochs, "seed": self.seed, "spoiled": self.spoiled, "mirroring": self.mirroring}
        return about

    def _claim(self) -> None:
        """Note in the working folder what it is for; SystemExit where it is for something else."""
        path, wanted = self.work / "settings.json", {**self.settings, "pool": self.pool}
        if self.spoiled:
            # Labels of round 0 do not depend on it, and no others are made.
            del wanted["seed"]
        if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8"))) != wanted:
            other = ", ".join(sorted(k for k in wanted.keys() | found.keys() if found.get(k) != wanted.get(k)))
            raise SystemExit(f"{self.work} is of other {other}: use another -o")
        path.write_text(json.dumps(wanted, indent=1), encoding="utf-8")

    def _spoil(self, folder: Path) -> None:
        """Spoil images, each from its original, so that it can be repeated; noted last."""
        images = [folder / f"{case}_0000{self.data.ending}" for case in sorted(self.pool)]
        for case, path in zip(sorted(self.pool), images, strict=True):
            shutil.copy(self.data.folder / "images" / f"{case}{self.data.ending}", path)
        changed = [path.name for path in spoil(images, 0)]
        (self.work / "spoiled.json").write_text(json.dumps(changed), encoding="utf-8")

    def row(self, name: str) -> dict[str, Any]:
        """A finished row, made now where it is not there yet; SystemExit where one is there that is of other things."""
        of_labels = name in (*LABELS, *LATER)
        cases = self.pool if of_labels else self.test
        if (done := read_row(self.key(name))) is not None:
            return self.checked(name, done, {**self.settings, "n": len(cases)})
        said = getattr(self, name)
        scored = evaluate(self.data.labels, said, self.dataset_json, cases=cases)
        if of_labels:
            _, raw = open_store(LABELLED)
            picture = self.work / "pictures" / f"{name}.png"
            draw_cases(self.data, raw, scored, said, picture, lambda case: raw.read_image(raw.case(case)))
        found = scored.case_mean()[:, METRICS.index("Dice")]
        content = {**self.settings, "row": name, "of": "labels" if of_labels else "model", "n": len(cases)}
        content |= {"dice": round(scored.summary[FOREGROUND]["Dice"].mean, 4)}
        content |= {"case_dice": [round(float(value), 4) for value in found]}
        content |= {
            "voices": "model, opinion, labels before",
            "left_out": left_out(COPIES.get(name, LABELLED)),
            "opinion": opinion_of(open_store(LABELLED)[0], AS_BEFORE),
        }
        return write_row(self.key(name), content)

    # --- labels, each a folder ---

    @property
    def before(self) -> Path:
        """Round 0's."""
        return open_store(LABELLED)[0].round_path(0, "x").parent

    @property
    def model(self) -> Path:
        """What the one model says."""
        return self._said_by("round_0")

    @property
    def model_labels(self) -> Path:
        """The model, fused with the labels before."""
        store, raw = open_store(LABELLED)
        return self._fused("model_labels", lambda case: [raw.read_label(store.round_path(0, case))])

    @property
    def model_views(self) -> Path:
        """The model, fused with all views."""
        store, raw = open_store(LABELLED)
        sources = sorted(store.read_manifest().sources)
        return self._fused(
            "model_views", lambda case: [view for source in sources for view in carried_views(raw, store, source, case)]
        )

    @property
    def model_opinion(self) -> Path:
        """The model, fused with SAM2's opinion."""
        store, raw = open_store(LABELLED)
        if opinion_of(store, AS_BEFORE) is None:
            raise SystemExit("model_opinion: SAM2 gives no opinion on this set; leave the row out")
        self._relabelled(LABELLED, self.model, 1)
        return self._fused("model_opinion", lambda case: carried_views(raw, store, source_of(1), case))

    @property
    def one(self) -> Path:
        """Round 1 as it is by default."""
        return self._relabelled(LABELLED, self.model, 1)

    @property
    def folds(self) -> Path:
        """Round 1, out of fold."""
        return self._relabelled(FOLDED, self._out_of_fold, 1)

    @property
    def two(self) -> Path:
        """Round 2."""
        return self._relabelled(LABELLED, self._said_by("scratch"), 2)

    @property
    def three(self) -> Path:
        """Round 3."""
        return self._relabelled(LABELLED, self._said_by("again"), 3)

    @property
    def ensemble(self) -> Path:
        """What the folds' models say together."""
        weights = [self._weights(f"fold_{fold}") for fold in range(FOLDS)]
        return self._said("ensemble", lambda output: self._predict_pool(weights, self.pool, output))

    @property
    def _out_of_fold(self) -> Path:
        held_out = [split["val"] for split in splits(open_store(FOLDED)[0].read_manifest(), FOLDS)]

        def fill(output: Path) -> None:
            for fold, cases in enumerate(held_out):
                self._predict_pool([self._weights(f"fold_{fold}")], cases, output)
            # Cases that are left out of training validate in no fold.
            self._predict_pool(
                [self._weights(f"fold_{fold}") for fold in range(FOLDS)],
                [case for case in self.pool if not any(case in cases for cases in held_out)],
                output,
            )

        return self._said("out_of_fold", fill)

    # --- models, each the folder of its predictions ---

    @property
    def round_0(self) -> Path:
        """Trained on the labels before."""
        return self._tested("round_0")

    @property
    def ungated(self) -> Path:
        """Trained on all of them."""
        return self._tested("ungated")

    @property
    def gated_more(self) -> Path:
        """Trained on fewer of them."""
        return self._tested("gated_more")

    @property
    def scratch(self) -> Path:
        """Trained on round 1's labels."""
        self._relabelled(LABELLED, self.model, 1)
        return self._tested("scratch")

    @property
    def warm(self) -> Path:
        """The same, from the weights of before."""
        self._relabelled(LABELLED, self.model, 1)
        return self._tested("warm")

    @property
    def warm_new_head(self) -> Path:
        """The same by nnU-Net's own way."""
        self._relabelled(LABELLED, self.model, 1)
        return self._tested("warm_new_head")

    @property
    def from_folds(self) -> Path:
        """Trained on the labels out of fold."""
        self._relabelled(FOLDED, self._out_of_fold, 1)
        return self._tested("from_folds")

    def _weights(self, name: str) -> Weights:
        """A model's weights, trained now where they are not there."""
        path = self.work / "weights" / f"{name}_seed{self.seed}_{self.epochs}.pt"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            fold: Fold = int(name.removeprefix("fold_")) if name.startswith("fold_") else "all"
            torch.save(self._trained_model(name, fold).network.state_dict(), path)
        return torch.load(path, weights_only=True)

    def _trained_model(self, name: str, fold: Fold) -> Any:
        number = COPIES.get(name, FOLDED if fold != "all" else LABELLED)
        wanted = TRAINED_ON.get(name, 0)
        if (found := open_store(number)[0].read_manifest().round) != wanted:
            raise SystemExit(f"expected labels of round {wanted} for {name}, found {found}: use another -o")
        refresh(number, 1)
        trainer = self._new(number, fold)
        if name == "warm":
            trainer.network.load_state_dict(self._weights("round_0"))
        if name == "warm_new_head":
            checkpoint = self.work / "weights" / "pretrained.pth"
            torch.save({"network_weights": self._weights("round_0")}, checkpoint)
            load_pretrained_weights(trainer.network, str(checkpoint))
        trainer.run_training()
        return trainer

    def _new(self, number: int, fold: Fold = "all") -> Any:
        names = (PRESET.trainer(), PRESET.plans)
        return make(number, self.configuration, names, self.epochs, self.seed, fold=fold)

    def _tested(self, name: str) -> Path:
        images = {case: [self.data.folder / "images" / f"{case}{self.data.ending}"] for case in self.test}
        return self._predict([self._weights(name)], images, self.work / "predictions" / f"{name}_seed{self.seed}")

    def _predict_pool(self, weights: Sequence[Weights], cases: Sequence[str], output: Path) -> None:
        _, raw = open_store(LABELLED)
        if cases:
            self._predict(weights, {case: raw.case(case).images for case in cases}, output)

    def _predict(self, weights: Sequence[Weights], images: Mapping[str, Sequence[Path]], output: Path) -> Path:
        return predict(self._new(LABELLED), images, output, self.mirroring, weights)

    def _said_by(self, name: str) -> Path:
        """What one model says of the pool."""
        return self._said(name, lambda output: self._predict_pool([self._weights(name)], self.pool, output))

    def _said(self, name: str, fill: Callable[[Path], None]) -> Path:
        output = self.work / "predictions" / f"pool_{name}_seed{self.seed}"
        if not output.is_dir():
            unfinished = output.with_name(f"{output.name}_unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            fill(unfinished)
            os.replace(unfinished, output)
        return output

    def _fused(self, name: str, others: Callable[[str], list[LabelVolume]]) -> Path:
        _, raw = open_store(LABELLED)

        def fill(output: Path) -> None:
            for case in map(raw.case, self.pool):
                said = raw.read_label(self.model / f"{case.name}{raw.file_ending}")
                label = fuse([said, *others(case.name)], spacing=raw.image_geometry(case)[1]).label
                raw.write_label(label, output / f"{case.name}{raw.file_ending}", case)

        return self._said(name, fill)

    def _relabelled(self, number: int, predictions: Path, made: int) -> Path:
        """Round `made` of a dataset, made now where it is not there; the folder of its best guesses."""
        store, raw = open_store(number)
        if store.read_manifest().round < made:
            chosen = opinion_of(store, AS_BEFORE)
            cases = [raw.case(name) for name in self.pool]
            asked = ask_sam2(raw, store, cases, predictions, made, chosen, "cpu", 1) if chosen else None
            relabel(raw, store, predictions, made, 1, GATED, Trust(asked))
        return store.round_path(made, "x").parent

    def _copy(self, number: int) -> None:
        raw_folder = nnunet.root("nnUNet_raw")
        source = next(raw_folder.glob(f"Dataset{LABELLED}_*"))
        target = raw_folder / source.name.replace(str(LABELLED), str(number))
        if not target.is_dir():
            shutil.copytree(source, target.with_name(f"{target.name}.part"))
            os.replace(target.with_name(f"{target.name}.part"), target)


def left_out(number: int) -> list[str]:
    """Cases that round 0's estimated quality leaves out of a dataset."""
    cases = kept_manifest(open_store(number)[0], 0).cases
    return sorted(name for name, record in cases.items() if record.status in LEFT_OUT)


def _deal(store: Store, raw: RawDataset) -> None:
    """Deal the cases over folds."""
    manifest = store.read_manifest().model_copy(update={"num_folds": FOLDS})
    write_training_files(raw, store, manifest)
    store.write_manifest(manifest)


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=(*LABELS, *MODELS, *LATER))
    parser.add_argument("--spoil", action="store_true", help="of half of the un-annotated images, another contrast")
    arguments = parser.parse_args()
    use_folders(arguments.o)
    os.environ["nnUNet_n_proc_DA"] = "0"
    rounds = Rounds(arguments, arguments.seed)
    rounds.prepare()
    wanted = arguments.rows or (SPOILED if arguments.spoil else (*LABELS, *MODELS, *LATER))
    for name in {"ungated", "gated_more"}.intersection(wanted):
        if left_out(COPIES[name]) == left_out(LABELLED):
            print(f"{name} leaves out the cases that round_0 leaves out: it would be round_0")
            wanted = [row for row in wanted if row != name]
    rows = {name: rounds.row(name) for name in wanted}
    firsts = {of: next(row for row in rows.values() if row["of"] == of) for of in {row["of"] for row in rows.values()}}
    table = [
        [row["of"], name, row["n"], f"{row['dice']:.3f}", difference([row], [firsts[row["of"]]])]
        for name, row in rows.items()
    ]
    print(markdown(["of", "row", "n", "Dice", "difference to the first of its kind"], table))


if __name__ == "__main__":
    main()
