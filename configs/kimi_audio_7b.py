"""The paper's run: Kimi-Audio-7B-Instruct, rewarded by Qwen2.5-Omni-7B, on a TPU slice or 8 GPUs.

    paras2s convert --from=Kimi-Audio-7B-Instruct --to=checkpoints/Kimi-Audio-7B-Instruct
    paras2s convert --from=Qwen/Qwen2.5-Omni-7B --to=checkpoints/Qwen2.5-Omni-7B
    paras2s compile --config=configs/kimi_audio_7b.py:v5p-4x4x4 --stage=grpo
    paras2s grpo --config=configs/kimi_audio_7b.py:v5p-4x4x4 --workdir=runs/kimi

The first folder is the release, with THUDM/glm-4-voice-tokenizer inside it. The argument is
TOPOLOGY[,lora]: chips and their shape; whether the policy is trained as adapters on frozen weights.
What a step and the whole run take: see `paras2s compile`. Figures are those of paper.md, section 3,
unless a comment says otherwise.
"""

import runpy
from pathlib import Path

import ml_collections
from ml_collections import ConfigDict

from paras2s_jax.models import axes

DEFAULT = "v5p-4x4x4"

# Told to load into fast memory only what is read often enough while it is there: left alone, the
# compiler brings in the trunk's keys for each step and writes all of them back, to add one.
_NO_ROUND_TRIPS = (("xla_tpu_msa_inefficient_use_to_copy_ratio", "0.75"),)

# Meshes over the same devices, data x fsdp x tensor: of training, and of decoding, where no weight
# is gathered. rollout: options for its compiler. accum: micro-batches of a GRPO update. Of these,
# prompts must divide over data, and all their answers over data x fsdp; 28 query heads, 4 key
# heads, a hidden width of 2^9 * 37 and a vocabulary of 2^9 * 329 over the tensor axis of training.
TOPOLOGIES = {
    "v5e-8x8": dict(mesh=(8, 2, 4), decode_mesh=(2, 8, 4), accum=2, rollout=_NO_ROUND_TRIPS),
    "v5e-16x16": dict(mesh=(32, 2, 4), decode_mesh=(4, 16, 4), accum=1),
    "v5p-4x4x4": dict(mesh=(1, 16, 4), decode_mesh=(2, 8, 4), accum=1),
    "v6e-8x8": dict(mesh=(1, 16, 4), decode_mesh=(2, 8, 4), accum=1),
    "h100-8": dict(mesh=(1, 8, 1), decode_mesh=(1, 8, 1), accum=4),
}
# As everywhere, but every large matrix is spread over all devices, whatever the batch lies over.
RULES = ((axes.EMBED, ("data", "fsdp")), *axes.TRAIN_RULES[1:])
# Four key heads let attention be split four ways; MLP and vocabulary are split further, over data
# too. So a step exchanges nothing but the two sums of each layer.
_WIDE = ("data", "tensor")
DECODE_RULES = (
    (axes.MLP, _WIDE),
    (axes.HEADS, "tensor"),
    (axes.KV_HEADS, "tensor"),
    (axes.VOCAB, _WIDE),
    (axes.ACT_BATCH, "fsdp"),
    (axes.ACT_ATTN_BATCH, ("fsdp", "data")),
    (axes.ACT_MLP, _WIDE),
    (axes.ACT_HEADS, "tensor"),
    (axes.ACT_KV_HEADS, "tensor"),
    (axes.ACT_VOCAB, _WIDE),
)

# Longest query and longest answer. With its 5 tokens around it a query fills 160 positions; the
# answer's 375 codes start 6 steps late and end with one more.
QUERY_S, ANSWER_S = 12.4, 30.0

PROMPTS = 10_000  # of the warm-up, and of distillation
RL_PROMPTS = 100_000


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Builds the config.

    Args:
        arg: TOPOLOGY or TOPOLOGY,lora; by default v5p-4x4x4, all weights trained.

    Raises:
        ValueError: any other arg.
    """
    topology, lora = _parse(arg)
    c = ConfigDict()
    c.seed = 0

    shapes = TOPOLOGIES[topology]
    c.topology = topology
    c.mesh = _mesh(shapes["mesh"])
    c.decode_mesh = _mesh(shapes["decode_mesh"])
    c.rules, c.decode_rules = RULES, DECODE_RULES

    # queries.jsonl and demonstrations.jsonl (data/records.py), wavs relative to the folder.
    c.data = ConfigDict(dict(folder="data/paras2s"))
    _add_policy(c, lora, shapes.get("rollout", ()))
    _add_sft(c)
    _add_distillation(c)
    _add_grpo(c, shapes["accum"])
    _add_judging(c)
    return c


def _parse(arg: str | None) -> tuple[str, bool]:
    topology, comma, rest = (arg or DEFAULT).partition(",")
    if topology not in TOPOLOGIES or (comma and rest != "lora"):
        raise ValueError(
            f"configs/kimi_audio_7b.py takes TOPOLOGY or TOPOLOGY,lora, not :{arg}; "
            f"topologies are {', '.join(TOPOLOGIES)}."
        )
    return topology, bool(comma)


def _mesh(sizes: tuple[int, int, int]) -> ConfigDict:
    return ConfigDict(dict(zip(("data", "fsdp", "tensor"), sizes)))


def _add_policy(c: ConfigDict, lora: bool, rollout_options: tuple) -> None:
    c.policy = ConfigDict()
    c.policy.checkpoint = "checkpoints/Kimi-Audio-7B-Instruct"
    # Depths, for plans of fewer layers; all other sizes are those of the checkpoint.
    c.policy.model = ConfigDict(
        dict(
            num_hidden_layers=28,
            kimia_mimo_layers=6,
            kimia_mimo_transformer_from_layer_index=21,
        )
    )
    # The paper trains all weights; it does not speak of adapters on the policy.
    c.policy.lora = ConfigDict(
        dict(
            rank=64 if lora else 0,
            alpha=128.0,
            targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        )
    )
    c.policy.trainable = "^lora/" if lora else ""
    # Masters in float32 where they are trained; adapters are float32 always.
    c.policy.dtype = "bfloat16"
    c.policy.param_dtype = "bfloat16" if lora else "float32"
    c.policy.max_steps = 384
    c.policy.scan_unroll = 1
    c.policy.remat = "dots"
    # Of a device's 1536 to 6144 tokens in a micro-batch.
    c.policy.logp_chunk = 1024
    # Reading the weights takes most of a decoding step: fewer rows would save little.
    c.policy.halvings = 0
    c.policy.rollout_options = rollout_options
    c.policy.detokenizer = ConfigDict(dict(ode_steps=30, chunked=True))
    c.policy.text_sampling = ConfigDict(dict(temperature=1.0, top_k=0))
    c.policy.audio_sampling = ConfigDict(dict(temperature=1.0, top_k=0))


# The paper states rates and batches, neither warm-up, schedule nor weight decay.
_UNSTATED = dict(
    weight_decay=0.0,
    schedule="cosine",
    save_every=100,
    keep=2,
    keep_every=0,
    max_skipped=3,
    max_bad_share=0.01,
)


def _add_sft(c: ConfigDict) -> None:
    # 100 h of dialogue. Adapters alone want about ten times this rate.
    batch_size, epochs = 64, 2
    c.sft = ConfigDict(
        _UNSTATED
        | dict(
            num_demonstrations=PROMPTS,
            batch_size=batch_size,
            num_steps=-(-PROMPTS * epochs // batch_size),
            accum_steps=1,
            lr=1e-5,
            warmup_steps=10,
            len_buckets_s=(QUERY_S, ANSWER_S),
            token_buckets=(256,),
        )
    )


def _add_distillation(c: ConfigDict) -> None:
    # The paper's batches of 10 ran on one GPU. These divide over the devices of every topology, so
    # that a run may move to another; one pass over all pairs.
    batch_size = 64
    num_samples, held_out_share = 32, 0.05
    pairs = round(PROMPTS * num_samples * (1 - held_out_share))
    c.distill = ConfigDict(
        _UNSTATED
        | dict(
            num_queries=PROMPTS,
            num_samples=num_samples,
            sample_batch_size=32,
            # "High temperature", without a number.
            text_sampling=dict(temperature=1.2, top_k=0),
            audio_sampling=dict(temperature=1.2, top_k=0),
            len_buckets_s=(QUERY_S,),
            pair_buckets_s=(QUERY_S, ANSWER_S + 1.0),
            # Verdicts on distill/samples/responses.jsonl, by a judge of your own; "" asks the
            # small one that comes with the package.
            verdicts="data/paras2s/verdicts.jsonl",
            swap_styles=False,
            held_out_share=held_out_share,
            batch_size=batch_size,
            num_steps=pairs // batch_size,
            accum_steps=1,
            lr=1e-6,
            warmup_steps=100,
            trainable="^lora/",
            findings_weight=0.0,
            model=dict(
                checkpoint="checkpoints/Qwen2.5-Omni-7B",
                family="qwen2_5_omni",
                # Depths, for plans of fewer layers.
                text=dict(num_hidden_layers=28),
                audio=dict(encoder_layers=32),
                dtype="bfloat16",
                param_dtype="bfloat16",
                # The paper does not state the adapters' sizes.
                lora_rank=16,
                lora_alpha=32.0,
                audio_lora_rank=0,
                audio_lora_targets=(),
                scan_unroll=1,
                remat="dots",
            ),
        )
    )


def _add_grpo(c: ConfigDict, accum_steps: int) -> None:
    num_prompts = 32
    c.grpo = ConfigDict(
        _UNSTATED
        | dict(
            group_size=8,
            beta=0.2,  # on both streams
            clip_low=0.2,
            clip_high=0.2,
            kl_estimator="k3",
            loss_type="grpo",
            scale_by_std=True,
            num_epochs=1,
            accum_steps=accum_steps,
            num_prompts=num_prompts,
            num_steps=RL_PROMPTS // num_prompts,
            # As the paper states it. Adapters bear this rate; for all weights of a 7B it is
            # hundreds of times what others use: try 1e-6 first.
            lr=5e-4,
            warmup_steps=10,
            save_every=20,
            len_buckets_s=(QUERY_S,),
            audit_every=0,  # the packaged recogniser knows only the packaged voices
            audit_prompts=4,
            # Alarms: see align/health.py. The packaged judge is no measure of these answers, so
            # that the gap to it (gap_every) stays unmeasured.
            health=dict(
                window=5,
                stop=(),
                kl_text=0.5,
                kl_audio=0.5,
                entropy_text=0.2,
                entropy_audio=0.2,
                zero_spread=0.7,
                wer=0.4,
                silent=0.1,
                clipped=0.3,
                len_text=2.0,
                len_audio=2.0,
                gap=1.0,
                gap_every=0,
                gap_queries=32,
            ),
        )
    )
    c.retention = ConfigDict(dict(betas=(0.0,)))


def _add_judging(c: ConfigDict) -> None:
    # The judge that comes with the package, small and trained where it runs.
    tiny = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["get_config"]()
    for name in ("synthesize", "pretrain", "polytone", "judge"):
        c[name] = tiny[name]
    c.bench = ConfigDict(
        tiny.bench.to_dict()
        | dict(
            systems=("base", "sft", "grpo"),
            batch_size=32,
            len_buckets_s=(QUERY_S,),
            num_samples=1,
        )
    )
