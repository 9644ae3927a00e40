"""Dimension letters and logical axis names; configs map the names to mesh axes.

Letters: B rows (B = P * G), P prompts, G samples per prompt, T tokens, S keys, D model,
F hidden, N heads, K kv heads, H head dim, V vocab, R response steps, L wave samples,
A audio frames, M mels.
"""

# Parameter axes.
EMBED = "embed"  # D
MLP = "mlp"  # F
HEADS = "heads"  # N * H, flattened
KV_HEADS = "kv_heads"  # K * H, flattened
VOCAB = "vocab"  # V
LAYERS = "layers"  # the axis that nn.scan adds
LORA_RANK = "lora_rank"
FEATURES = "features"  # width of inputs from another model

# Activation axes.
ACT_BATCH = "act_batch"
ACT_ATTN_BATCH = "act_attn_batch"  # rows inside attention, and of its caches
ACT_LEN = "act_len"
ACT_EMBED = "act_emb"
ACT_MLP = "act_mlp"
ACT_HEADS = "act_heads"
ACT_KV_HEADS = "act_kv_heads"
ACT_VOCAB = "act_vocab"

PARAM_AXES = (EMBED, MLP, HEADS, KV_HEADS, VOCAB, LAYERS, LORA_RANK, FEATURES)
ACTIVATION_AXES = (
    ACT_BATCH,
    ACT_ATTN_BATCH,
    ACT_LEN,
    ACT_EMBED,
    ACT_MLP,
    ACT_HEADS,
    ACT_KV_HEADS,
    ACT_VOCAB,
)

# Usual rules of two meshes with the axes data, fsdp and tensor. In training, parameters are spread
# over fsdp and gathered layer by layer where they are used.
TRAIN_RULES = (
    (EMBED, "fsdp"),
    (MLP, "tensor"),
    (HEADS, "tensor"),
    (KV_HEADS, "tensor"),
    (VOCAB, "tensor"),
    (ACT_BATCH, ("data", "fsdp")),
    (ACT_ATTN_BATCH, ("data", "fsdp")),
    (ACT_MLP, "tensor"),
    (ACT_HEADS, "tensor"),
    (ACT_KV_HEADS, "tensor"),
    (ACT_VOCAB, "tensor"),
)
# In decoding, weights stay where they are multiplied with. Few key heads limit how far attention
# can be split by heads, so its rows (and with them the cache) are spread over all devices instead.
DECODE_RULES = (
    (MLP, "tensor"),
    (HEADS, "tensor"),
    (KV_HEADS, "tensor"),
    (VOCAB, "tensor"),
    (ACT_BATCH, ("data", "fsdp")),
    (ACT_ATTN_BATCH, ("data", "fsdp", "tensor")),
    (ACT_MLP, "tensor"),
    (ACT_VOCAB, "tensor"),
)
