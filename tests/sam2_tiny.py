"""A SAM2 of sam2's own classes, small enough for tests on a CPU, and phantoms for it to look at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sam2_propagation.architecture import SAM2Base, build_sam2

_SINE = "sam2.modeling.position_encoding.PositionEmbeddingSine"
_WIDTH, _MEMORY = 32, 16


def _attention(**extra: Any) -> dict[str, Any]:
    return {
        "_target_": "sam2.modeling.sam.transformer.RoPEAttention",
        "rope_theta": 10000.0,
        "feat_sizes": [4, 4],
        "embedding_dim": _WIDTH,
        "num_heads": 1,
        "downsample_rate": 1,
        "dropout": 0.1,
        **extra,
    }


def _image_encoder() -> dict[str, Any]:
    return {
        "_target_": "sam2.modeling.backbones.image_encoder.ImageEncoder",
        "scalp": 1,
        "trunk": {
            "_target_": "sam2.modeling.backbones.hieradet.Hiera",
            "embed_dim": 8,
            "num_heads": 1,
            "stages": [1, 1, 2, 1],
            "global_att_blocks": [3],
            "window_pos_embed_bkg_spatial_size": [4, 4],
        },
        "neck": {
            "_target_": "sam2.modeling.backbones.image_encoder.FpnNeck",
            "position_encoding": {"_target_": _SINE, "num_pos_feats": _WIDTH, "normalize": True, "temperature": 10000},
            "d_model": _WIDTH,
            "backbone_channel_list": [64, 32, 16, 8],
            "fpn_top_down_levels": [2, 3],
            "fpn_interp_model": "nearest",
        },
    }


def _memory_attention() -> dict[str, Any]:
    return {
        "_target_": "sam2.modeling.memory_attention.MemoryAttention",
        "d_model": _WIDTH,
        "pos_enc_at_input": True,
        "num_layers": 1,
        "layer": {
            "_target_": "sam2.modeling.memory_attention.MemoryAttentionLayer",
            "activation": "relu",
            "dim_feedforward": 32,
            "dropout": 0.1,
            "pos_enc_at_attn": False,
            "self_attention": _attention(),
            "d_model": _WIDTH,
            "pos_enc_at_cross_attn_keys": True,
            "pos_enc_at_cross_attn_queries": False,
            "cross_attention": _attention(rope_k_repeat=True, kv_in_dim=_MEMORY),
        },
    }


def _memory_encoder() -> dict[str, Any]:
    return {
        "_target_": "sam2.modeling.memory_encoder.MemoryEncoder",
        "in_dim": _WIDTH,
        "out_dim": _MEMORY,
        "position_encoding": {"_target_": _SINE, "num_pos_feats": _MEMORY, "normalize": True, "temperature": 10000},
        "mask_downsampler": {
            "_target_": "sam2.modeling.memory_encoder.MaskDownSampler",
            "embed_dim": _WIDTH,
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
        },
        "fuser": {
            "_target_": "sam2.modeling.memory_encoder.Fuser",
            "num_layers": 1,
            "layer": {
                "_target_": "sam2.modeling.memory_encoder.CXBlock",
                "dim": _WIDTH,
                "kernel_size": 3,
                "padding": 1,
                "layer_scale_init_value": 1.0,
                "use_dwconv": True,
            },
        },
    }


_SCORES = {"pred_obj_scores": True, "pred_obj_scores_mlp": True}
_POINTERS = {
    "use_obj_ptrs_in_encoder": True,
    "add_tpos_enc_to_obj_ptrs": True,
    "proj_tpos_enc_in_obj_ptrs": True,
    "use_signed_tpos_enc_to_obj_ptrs": True,
    "only_obj_ptrs_in_the_past_for_eval": True,
    "use_mlp_for_obj_ptr_proj": True,
}
_MULTIMASK = {
    "multimask_output_in_sam": True,
    "multimask_output_for_tracking": True,
    "multimask_min_pt_num": 0,
    "multimask_max_pt_num": 1,
}


def tiny_config(
    image_size: int = 64, scores: bool = True, pointers: bool = True, multimask: bool = True, **extra: Any
) -> dict[str, Any]:
    """A `model:` tree in SAM2.1's manner, with and without object scores, object pointers and several masks."""
    tree: dict[str, Any] = {
        "_target_": "sam2.modeling.sam2_base.SAM2Base",
        "image_encoder": _image_encoder(),
        "memory_attention": _memory_attention(),
        "memory_encoder": _memory_encoder(),
        "num_maskmem": 7,
        "image_size": image_size,
        "sigmoid_scale_for_mem_enc": 20.0,
        "sigmoid_bias_for_mem_enc": -10.0,
        "use_mask_input_as_output_without_sam": True,
        "directly_add_no_mem_embed": True,
        "use_high_res_features_in_sam": True,
        "iou_prediction_use_sigmoid": True,
        **(_SCORES if scores else {}),
        **(_POINTERS if pointers else {}),
        **(_MULTIMASK if multimask else {}),
    }
    if scores and pointers:
        tree["fixed_no_obj_ptr"] = True
        tree["no_obj_embed_spatial"] = True
    return {"model": {**tree, **extra}}


def tiny_model(seed: int = 0, **options: Any) -> SAM2Base:
    """A tiny model with weights drawn from a seed, lively enough that masks depend on frames and prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_sam2(tiny_config(**options))
    enliven(model)
    return model


@torch.no_grad()
def enliven(model: SAM2Base) -> None:
    """Fresh weights hardly let a prompt reach a mask, and deny every object; this mends both."""
    for name, parameter in model.named_parameters():
        if "sam_mask_decoder" in name or "memory" in name or "obj_ptr" in name:
            parameter.mul_(1.5)
    if model.pred_obj_scores:
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.add_(3.0)


def balls(shape: tuple[int, int, int], shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two balls on a noisy ground: float32 image (Z, Y, X) and int16 label with the classes 1 and 2."""
    noise = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij")
    label = np.zeros(shape, np.int16)
    label[z**2 + y**2 + (x - 0.4 - shift) ** 2 < 0.25] = 1
    label[z**2 + (y - 0.2) ** 2 + (x + 0.5 - shift) ** 2 < 0.09] = 2
    image = 100.0 + 200.0 * label + noise.normal(0, 10, shape)
    return image.astype(np.float32), label
