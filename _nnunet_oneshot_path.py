"""Run at every start of Python by nnunet_oneshot.pth: lets nnU-Net find our trainers. Keep it to `os` alone."""

import os

_VARIABLE = "nnUNet_extTrainer"


def register(folder=None):
    """Append the folder of the trainers to nnUNet_extTrainer, after what the user put there."""
    folder = folder or os.path.join(os.path.dirname(os.path.abspath(__file__)), "nnunet_oneshot_trainers")
    known = [path for path in os.environ.get(_VARIABLE, "").split(os.pathsep) if path]
    if folder not in known:
        os.environ[_VARIABLE] = os.pathsep.join([*known, folder])


register()
