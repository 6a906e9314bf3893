"""The config.json of published checkpoints, as far as it describes the network."""

_QWEN_VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
_QWEN = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "model_type": "qwen2_5_vl",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
_SIGLIP_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
_SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "sample_size": 128,
}

CONFIGS = {
    "Qwen2.5-VL-3B": _QWEN
    | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_window_layers": 70,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vision_config": _QWEN_VISION | {"out_hidden_size": 2048},
        "vocab_size": 151936,
    },
    "Qwen2.5-VL-7B": _QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vision_config": _QWEN_VISION | {"out_hidden_size": 3584},
        "vocab_size": 152064,
    },
    # As transformers 4.49 has left it: without what is equal to its defaults.
    "Qwen2.5-VL-32B": _QWEN
    | {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_window_layers": 64,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vision_config": {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 5120, "in_chans": 3},
        "vocab_size": 152064,
    },
    "siglip-so400m-patch14-384": {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": _SIGLIP_TOWER | {"model_type": "siglip_text_model"},
        "vision_config": _SIGLIP_TOWER | {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14},
    },
    "SD3-medium": _SD3
    | {
        "caption_projection_dim": 1536,
        "num_attention_heads": 24,
        "num_layers": 24,
        "pos_embed_max_size": 192,
    },
    "SD3.5-medium": _SD3
    | {
        "caption_projection_dim": 1536,
        "dual_attention_layers": list(range(13)),
        "num_attention_heads": 24,
        "num_layers": 24,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
    },
    "SD3.5-large": _SD3
    | {
        "caption_projection_dim": 2432,
        "dual_attention_layers": [],
        "num_attention_heads": 38,
        "num_layers": 38,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
