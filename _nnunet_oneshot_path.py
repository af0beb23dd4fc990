"""Lets nnU-Net find our trainers: run at every start of Python by nnunet_oneshot.pth, so it imports os alone."""

import os

_VARIABLE = "nnUNet_extTrainer"


def trainers_folder():
    """The trainers beside this file: in a folder of their own when installed, `trainers` in a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, "nnunet_oneshot_trainers")
    return installed if os.path.isdir(installed) else os.path.join(here, "trainers")


def register():
    """Append that folder to nnUNet_extTrainer, where nnU-Net looks for trainers, after what the user put there."""
    known = [path for path in os.environ.get(_VARIABLE, "").split(os.pathsep) if path]
    if trainers_folder() not in known:
        os.environ[_VARIABLE] = os.pathsep.join([*known, trainers_folder()])


register()
