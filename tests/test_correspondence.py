"""The `correspondence` propagator: learns without labels, carries one slice through a volume, says where it drifts."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from sam2_propagation.consensus import fuse
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.correspondence_training import Learner, Recipe, cut_pair, draw_pair
from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import Image, LabelVolume, Propagation, Propagator, Support

IGNORE = 9
SHAPE = (7, 40, 44)
SPACING = (5.0, 1.0, 1.0)
QUICK = Recipe(steps=40, batch=2, crop=48, radius=3)
ANNOTATED = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What the machine has is shared; torch's own setting is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def body(seed: int, shift: float = 0.0, channels: int = 1) -> tuple[Image, LabelVolume]:
    """Two organs that wander and change their size from slice to slice, in textured surroundings."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.arange(n, dtype=float) for n in SHAPE), indexing="ij")
    first = (y - 18 - 1.2 * (z - 3) - shift) ** 2 + (x - 14 + (z - 3)) ** 2 < (8 - abs(z - 3)) ** 2
    second = (y - 24 - shift) ** 2 + (x - 32 - (z - 3)) ** 2 < 25
    label = np.where(first, 1, np.where(second, 2, 0)).astype(np.int16)
    texture = 20 * ndimage.gaussian_filter(rng.normal(size=SHAPE), (1, 3, 3)) / 0.1
    data = 200 + texture + np.choose(label, [0, 150, -120]) + rng.normal(0, 5, SHAPE)
    data = ndimage.gaussian_filter(data, (0, 0.7, 0.7)).astype(np.float32)
    return Image(f"case_{seed}", np.stack([data * (c + 1) for c in range(channels)]), SPACING), label


def sparse(image: Image, label: LabelVolume, *slices: int) -> Support:
    kept = np.full_like(label, IGNORE)
    kept[list(slices)] = label[list(slices)]
    return Support(image, kept, IGNORE)


def overlap(found: LabelVolume, truth: LabelVolume, value: int) -> float:
    a, b = found == value, truth == value
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def taught(folder: Path) -> CorrespondencePropagator:
    """A propagator that has learnt from three bodies."""
    made = CorrespondencePropagator(recipe=QUICK, cache=folder)
    made.fit(body(seed)[0] for seed in range(3))
    return made


@pytest.fixture(scope="module")
def through(taught: CorrespondencePropagator) -> dict[str, Propagation]:
    """One slice carried through its volume, by view."""
    image, label = body(0)
    found = taught.propagate([sparse(image, label, ANNOTATED)], [image], taught.views)
    return {result.view: result for result in found}


def test_it_is_a_propagator(taught: CorrespondencePropagator) -> None:
    assert isinstance(taught, Propagator)
    assert set(taught.default_views) <= set(taught.views)


def test_one_slice_labels_its_volume_better_than_a_copy_of_it(through: dict[str, Propagation]) -> None:
    _, truth = body(0)
    copy = np.repeat(truth[ANNOTATED : ANNOTATED + 1], SHAPE[0], axis=0)
    found = through["joint"].label
    assert found is not None
    assert found.shape == SHAPE
    assert found.dtype == np.int16
    for value in (1, 2):
        assert overlap(found, truth, value) > max(0.8, overlap(copy, truth, value))


def test_what_was_drawn_stays_and_every_voxel_gets_a_label(through: dict[str, Propagation]) -> None:
    _, truth = body(0)
    for result in through.values():
        assert result.label is not None
        np.testing.assert_array_equal(result.label[ANNOTATED], truth[ANNOTATED])
        assert set(np.unique(result.label)) <= {0, 1, 2}


def test_confidence_and_scores_are_shares(through: dict[str, Propagation]) -> None:
    for result in through.values():
        assert result.confidence is not None
        assert result.confidence.shape == SHAPE
        assert 0 <= result.confidence.min() <= result.confidence.max() <= 1
        assert (result.confidence[ANNOTATED] == 1).all()
        assert set(result.scores) == {"cycle", "drift", "confidence"}
        assert all(0 <= value <= 1 for value in result.scores.values())


def test_two_runs_are_equal_in_another_process_too(
    taught: CorrespondencePropagator, through: dict[str, Propagation]
) -> None:
    image, label = body(0)
    sent = pickle.loads(pickle.dumps(taught))
    again = next(iter(sent.propagate([sparse(image, label, ANNOTATED)], [image], ["joint"])))
    np.testing.assert_array_equal(again.label, through["joint"].label)


def test_noise_in_the_volume_lowers_the_cycle_score(taught: CorrespondencePropagator) -> None:
    """What is found on slices that show nothing does not lead back."""
    image, label = body(0)
    data = image.data.copy()
    data[:, 5:] = np.random.default_rng(5).normal(200, 60, data[:, 5:].shape)
    broken = Image("case_0", data, SPACING)
    good = next(iter(taught.propagate([sparse(image, label, ANNOTATED)], [image], ["joint"])))
    bad = next(iter(taught.propagate([sparse(broken, label, ANNOTATED)], [broken], ["joint"])))
    assert bad.scores["cycle"] < good.scores["cycle"] - 0.02


def test_a_jump_in_the_volume_shows_as_divergence(taught: CorrespondencePropagator) -> None:
    """From slice 4 on everything lies 16 pixels aside: where `joint` drifts, `checked` contradicts it."""
    image, label = body(0)
    data = image.data.copy()
    data[:, 4:] = np.roll(data[:, 4:], 16, axis=3)
    drifted = {}
    for name, shown in (("whole", image), ("broken", Image("case_0", data, SPACING))):
        joint, checked = taught.propagate([sparse(shown, label, ANNOTATED)], [shown], ["joint", "checked"])
        assert joint.label is not None
        drifted[name] = joint.label != checked.label
        np.testing.assert_array_equal(drifted[name], joint.confidence == 0)
        assert joint.scores["drift"] == pytest.approx(
            (drifted[name] & (joint.label > 0)).sum() / (joint.label > 0).sum()
        )
    # Along outlines no class holds a cell clearly; beyond the jump next to nothing is to be believed.
    outlines = drifted["whole"].mean(axis=(1, 2))
    assert outlines.max() < 0.1
    np.testing.assert_array_equal(drifted["broken"][:4], drifted["whole"][:4], "before the jump all is as it was")
    assert (drifted["broken"][4:].mean(axis=(1, 2)) > 2 * outlines[4:]).all()


@pytest.mark.parametrize("upside_down", [False, True])
def test_least_survives_a_jump(taught: CorrespondencePropagator, upside_down: bool) -> None:
    """Between slices 3 and 4, counted as they are stored, whichever end is up."""
    data = body(0)[0].data.copy()
    data[:, 4:] = np.roll(data[:, 4:], 16, axis=3)
    direction = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0 if upside_down else 1.0)
    kept = taught.survival(replace(body(0)[0], data=data, direction=direction))
    assert kept.shape == (SHAPE[0] - 1,)
    assert (kept >= 0).all()
    assert (kept <= 1).all()
    assert kept.argmin() == 3


def test_two_annotated_slices_are_both_heard(taught: CorrespondencePropagator) -> None:
    image, truth = body(1)
    one = next(iter(taught.propagate([sparse(image, truth, 1)], [image], ["joint"])))
    two = next(iter(taught.propagate([sparse(image, truth, 1, 5)], [image], ["joint"])))
    assert one.label is not None
    assert two.label is not None
    np.testing.assert_array_equal(two.label[5], truth[5])
    assert overlap(two.label, truth, 1) > overlap(one.label, truth, 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 1.0]))
def test_training_pairs_are_two_slices_that_exist(lengths: list[int], seed: int, across: float) -> None:
    draw = draw_pair(np.random.default_rng(seed), lengths, 3, across)
    own, other = draw.volumes
    assert 0 <= draw.target < lengths[own]
    assert 0 <= draw.source < lengths[other]
    if across == 1 and len(lengths) > 1:
        assert own != other
        levels = (draw.target + 0.5) / lengths[own], (draw.source + 0.5) / lengths[other]
        assert abs(levels[0] - levels[1]) <= 1 / lengths[other]
    else:
        assert across or own == other
    alone = (own, draw.target) == (other, draw.source)
    assert alone == (own == other and lengths[own] == 1)
    target, source = cut_pair([torch.rand(n, 1, 12, 20 - n) for n in lengths], draw, 16)
    assert target.shape == source.shape == (1, 16, 16)


@pytest.mark.parametrize("how", ["whole", "one slice"])
def test_other_volumes_are_labelled_from_one_annotated_case(taught: CorrespondencePropagator, how: str) -> None:
    image, label = body(0)
    support = Support(image, label) if how == "whole" else sparse(image, label, ANNOTATED)
    query, truth = body(2, shift=4)
    results = list(taught.propagate([support], [query], taught.views))
    assert [r.view for r in results] == list(taught.views)
    fused = fuse([r.label for r in results if r.label is not None]).label
    assert overlap(fused, truth, 1) > 0.6
    assert overlap(fused, truth, 2) > 0.6


def test_labels_land_in_the_array_however_it_is_stored(
    taught: CorrespondencePropagator, through: dict[str, Propagation]
) -> None:
    """The same body stored upside down and left to right gives the same label, stored so too."""
    image, label = body(0)
    flip = (slice(None, None, -1), slice(None), slice(None, None, -1))
    turned = Image(
        "case_0",
        np.ascontiguousarray(image.data[(slice(None), *flip)]),
        SPACING,
        direction=(-1, 0, 0, 0, 1, 0, 0, 0, -1),
    )
    support = sparse(turned, np.ascontiguousarray(label[flip]), SHAPE[0] - 1 - ANNOTATED)
    found = next(iter(taught.propagate([support], [turned], ["joint"])))
    assert found.label is not None
    assert through["joint"].label is not None
    assert (found.label[flip] == through["joint"].label).mean() > 0.999


@pytest.mark.slow
def test_training_is_kept_and_taken_up_again(
    folder: Path, taught: CorrespondencePropagator, capsys: pytest.CaptureFixture
) -> None:
    again = CorrespondencePropagator(recipe=QUICK, cache=folder)
    again.fit(body(seed)[0] for seed in range(3))
    assert "learn correspondence" not in capsys.readouterr().err, "nothing was left to learn"
    other = CorrespondencePropagator(recipe=QUICK, cache=folder)
    other.fit([body(7)[0]])
    assert "learn correspondence" in capsys.readouterr().err, "other images, another network"


def other_layers(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["network"] = {f"{key}_before": value for key, value in state["network"].items()}
    torch.save(state, path)


def wider(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["network"] = {key: torch.cat([value] * 2) if value.ndim else value for key, value in state["network"].items()}
    torch.save(state, path)


@pytest.mark.parametrize(
    "damage",
    [
        other_layers,
        wider,
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"nothing of ours"),
        lambda path: torch.save([1, 2], path),
    ],
    ids=["other layers", "wider", "cut short", "empty", "something else", "a list"],
)
def test_a_kept_network_that_cannot_be_read_is_learnt_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture, damage: Callable[[Path], object]
) -> None:
    recipe = Recipe(steps=1, batch=1, crop=32, radius=2)

    def learnt() -> bytes:
        made = CorrespondencePropagator(recipe=recipe, cache=tmp_path)
        made.fit([body(0)[0]])
        assert made._learned is not None
        return b"".join(v.numpy().tobytes() for v in made._learned.network.state_dict().values())

    first = learnt()
    (kept,) = tmp_path.glob("correspondence-*.pt")
    damage(kept)
    capsys.readouterr()
    assert learnt() == first, "from the start, nothing of the broken file in it"
    assert "cannot be read" in capsys.readouterr().err
    assert learnt() == first
    assert "learn" not in capsys.readouterr().err, "the file was put right"


def test_a_network_of_another_format_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        monkeypatch.setattr("sam2_propagation.correspondence_learning.FORMAT", number)
        CorrespondencePropagator(recipe=Recipe(steps=1, batch=1, crop=32), cache=tmp_path).fit([body(0)[0]])
    assert len(list(tmp_path.glob("correspondence-*.pt"))) == 2


def test_a_folder_that_cannot_hold_networks_is_said(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(PropagationError, match="nnUNet_oneshot_checkpoints"):
        CorrespondencePropagator(recipe=QUICK, cache=tmp_path / "taken").fit([body(0)[0]])


def test_a_stopped_training_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    recipe = Recipe(steps=4, batch=1, crop=32, radius=2)
    volumes = [torch.rand(4, 1, 40, 48, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    unbroken, stopped = (Learner(recipe, 1, torch.device("cpu")) for _ in range(2))
    unbroken.train(volumes)

    def stop(_: float) -> None:
        if stopped.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.train(volumes, tmp_path / "net.pt", every=2, tick=stop)
    resumed = Learner(recipe, 1, torch.device("cpu"))
    resumed.restore(tmp_path / "net.pt")
    assert resumed.step == 2
    resumed.train(volumes, tmp_path / "net.pt")
    for one, other in zip(unbroken.network.state_dict().values(), resumed.network.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_multi_channel_images_and_single_slices_can_be_learnt(tmp_path: Path) -> None:
    made = CorrespondencePropagator(recipe=Recipe(steps=20, batch=2, crop=32, radius=2), cache=tmp_path)
    pairs = [body(seed, channels=2) for seed in range(2)]
    flat = [(Image(i.case, i.data[:, 3:4]), label[3:4]) for i, label in pairs]
    made.fit(image for image, _ in flat)
    results = list(made.propagate([Support(*flat[0])], [flat[1][0]], ["joint", "coarse"]))
    assert [r.case for r in results] == ["case_1"] * 2
    for result in results:
        assert result.label is not None
        assert result.label.shape == (1, *SHAPE[1:])
        assert all(overlap(result.label, flat[1][1], value) > 0.6 for value in (1, 2))


def test_images_of_different_channels_are_refused(taught: CorrespondencePropagator, tmp_path: Path) -> None:
    made = CorrespondencePropagator(recipe=QUICK, cache=tmp_path)
    with pytest.raises(PropagationError, match="channels"):
        made.fit([body(0)[0], body(1, channels=2)[0]])
    with pytest.raises(PropagationError, match="channels"):
        list(taught.propagate([Support(*body(0))], [body(1, channels=2)[0]], ["joint"]))
    with pytest.raises(PropagationError, match="none"):
        made.fit([])


def test_what_cannot_be_carried_is_said(taught: CorrespondencePropagator) -> None:
    image, label = body(0)
    with pytest.raises(PropagationError, match="at least one annotated case"):
        list(taught.propagate([], [image], ["joint"]))
    with pytest.raises(PropagationError, match="foreground on the annotated slices of case_0"):
        list(taught.propagate([sparse(image, 0 * label, 2)], [image], ["joint"]))
    scribble = np.full_like(label, IGNORE)
    scribble[3, 18:20, 10:20] = 1
    with pytest.raises(PropagationError, match="whole annotated slice"):
        list(taught.propagate([Support(image, scribble, IGNORE)], [image], ["joint"]))
    with pytest.raises(ValueError, match="unknown views"):
        list(taught.propagate([Support(image, label)], [image], ["sideways"]))
    with pytest.raises(ValueError, match="fit"):
        list(CorrespondencePropagator().propagate([Support(image, label)], [image], ["joint"]))


def test_an_annotated_slice_at_the_end_of_the_stack_is_carried_one_way(taught: CorrespondencePropagator) -> None:
    image, truth = body(0)
    found = next(iter(taught.propagate([sparse(image, truth, 0)], [image], ["joint"])))
    assert found.label is not None
    assert overlap(found.label, truth, 2) > 0.6


@pytest.mark.slow
def test_a_slice_drawn_across_another_axis_is_carried_along_it(taught: CorrespondencePropagator) -> None:
    image, truth = body(0)
    kept = np.full_like(truth, IGNORE)
    kept[:, 18] = truth[:, 18]
    found = next(iter(taught.propagate([Support(image, kept, IGNORE)], [image], ["joint"])))
    assert found.label is not None
    np.testing.assert_array_equal(found.label[:, 18], truth[:, 18])
    query, other = body(2)
    carried = next(iter(taught.propagate([Support(image, kept, IGNORE)], [query], ["joint"])))
    assert carried.label is not None, "and to other volumes"
    assert overlap(carried.label, other, 1) > 0.4


def test_a_volume_whose_own_slice_is_empty_is_labelled_from_others(taught: CorrespondencePropagator) -> None:
    image, label = body(0)
    other, truth = body(1)
    nothing = sparse(other, np.where(np.arange(SHAPE[0])[:, None, None] == 3, 0, truth).astype(np.int16), 3)
    found = next(iter(taught.propagate([Support(image, label), nothing], [other], ["joint"])))
    assert found.label is not None
    assert overlap(found.label, truth, 1) > 0.6


def test_a_class_that_is_not_on_the_own_slice_comes_from_the_others(taught: CorrespondencePropagator) -> None:
    image, label = body(0)
    other, truth = body(1)
    without_first = sparse(other, np.where(truth == 1, 0, truth).astype(np.int16), 3)
    alone = next(iter(taught.propagate([without_first], [other], ["joint"])))
    assert alone.label is not None
    assert not (alone.label == 1).any(), "nothing shows that class"
    found = next(iter(taught.propagate([Support(image, label), without_first], [other], ["joint"])))
    assert found.label is not None
    assert overlap(found.label, truth, 1) > 0.5
    np.testing.assert_array_equal(found.label == 2, alone.label == 2)
    np.testing.assert_array_equal(found.label[3], np.where(truth[3] == 1, 0, truth[3]), "what a person drew stays")
