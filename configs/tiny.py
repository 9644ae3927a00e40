"""The whole method on a laptop CPU, nothing downloaded but packages.

    paras2s align --config=configs/tiny.py --workdir=runs/tiny

Two cores, minutes, under 6 GB of memory. The small pretrained parts (codec, recogniser, tone namer,
tokenizers, tone-deaf base policy) come with the package; `configs/tiny.py:from_scratch` trains them
first. `configs/tiny.py:quick` is the same recipe with less of everything, to see it run:
about ten minutes, too few for GRPO to show an effect.
"""

import ml_collections
from ml_collections import ConfigDict

from paras2s_jax.models import axes

LEN_BUCKETS_S = (1.5, 2.0, 3.0, 4.2)


# What training on spoken answers has in common. Where steps are few, one bucket for all lengths:
# compiling more takes about as long as they save.
_DEMONSTRATIONS = dict(
    batch_size=32,
    accum_steps=1,
    lr=1e-3,
    warmup_steps=20,
    weight_decay=0.01,
    schedule="cosine",
    save_every=200,
    keep=2,  # last checkpoints
    keep_every=0,  # or those of every so many steps, for ever
    max_skipped=5,  # updates in a row that are not finite
    len_buckets_s=(3.6,),
    token_buckets=(32,),
    max_bad_share=0.01,
)


def whisper(**fields) -> ConfigDict:
    """A small Whisper: 16 kHz, 80 mels, 50 frames a second."""
    base = dict(
        d_model=96,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=288,
        num_mel_bins=80,
        max_source_positions=216,
    )
    return ConfigDict(base | fields)


def endpoint(**fields) -> ConfigDict:
    """An OpenAI-compatible server; see data/endpoint.py."""
    base = dict(
        base_url="https://api.openai.com/v1",
        model="gpt-4.1",
        api_key_env="OPENAI_API_KEY",
        concurrency=8,
        requests_per_minute=0.0,  # 0: no limit
        timeout_s=60.0,
        max_retries=5,
        usd_per_million_in=0.0,
        usd_per_million_out=0.0,
        usd_cap=0.0,  # of one run; 0: none
    )
    return ConfigDict(base | fields)


def audio_endpoint(**fields) -> ConfigDict:
    """One that hears, or speaks: slower."""
    return endpoint(**dict(model="gpt-audio", concurrency=4, timeout_s=120.0) | fields)


def reward_model() -> ConfigDict:
    """A small audio language model around the recogniser's encoder."""
    return ConfigDict(
        dict(
            checkpoint="",  # from scratch, or the folder of a released one
            family="qwen2_audio",  # or qwen2_5_omni, which hears in windows
            audio=dict(n_window=100),  # half a window of the latter, in mel frames
            text=dict(
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                rope_theta=10_000.0,
            ),
            lora_rank=16,
            lora_alpha=32.0,
            audio_lora_rank=16,
            audio_lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
            dtype="float32",
            param_dtype="float32",
            scan_unroll=1,
            remat="none",
        )
    )


def judge(**fields) -> ConfigDict:
    """The judge's stages; by default those that come with the package or are trained in the run."""
    base = dict(
        batch_size=32,
        dtype="float32",  # of released models
        # "packaged", or a released Whisper: folder or hub id. "none" with the scorer "reward".
        transcriber="packaged",
        language="en",  # of a released one; "" detects it
        # Per dimension "trained" (stage analyzers), the folder "analyzers" of another run, ""
        # (labels are taken as true), or a released classifier, whose labels analyzer_names maps to
        # styles: (("hap", "happy"), ("ang", "angry")).
        analyzers=dict.fromkeys(("emotion", "sarcasm", "age", "gender"), "trained"),
        analyzer_names=dict(emotion=(), sarcasm=(), age=(), gender=()),
        len_buckets_s=(4.0, 8.0, 16.0, 30.0),  # of released classifiers
        # "packaged", a released Qwen2-Audio (Audio-Reasoner wants about 1000 new tokens), or
        # "endpoint": a model behind a server that takes audio. "none" with the scorer "reward".
        tone="packaged",
        tone_max_new_tokens=16,
        tone_prompt_version="1",
        tone_endpoint=audio_endpoint(),
        # "rubric" reads cue phrases; "endpoint" and "local" are language models with a prompt;
        # "reward" is the distilled reward model, which hears the two waveforms.
        scorer="rubric",
        num_repeats=1,
        prompt_version="1",
        duel_prompt_version="1",  # of `paras2s duel`
        endpoint=endpoint(),
        response_format="json_schema",
        temperature=0.0,
        max_tokens=300,
        local=dict(checkpoint="Qwen/Qwen2.5-7B-Instruct", batch_size=8),
        # folder: "" for the run's own, distill/reward_model. A pair is padded to one of these
        # lengths; none may be longer than the model hears.
        reward=dict(folder="", batch_size=32, len_buckets_s=(2.0, 3.2, 4.2)),
    )
    return ConfigDict(base | fields)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Builds the config.

    Args:
        arg: None for the packaged parts, "from_scratch" to train them too, "quick" for a run of
            some minutes.

    Raises:
        ValueError: any other arg.
    """
    if arg not in (None, "", "from_scratch", "quick"):
        raise ValueError(f"configs/tiny.py takes no argument, :from_scratch or :quick, not :{arg}.")
    c = ConfigDict()
    c.seed = 0
    # Devices: another mesh of the same ones may be given for decoding. topology: chips that
    # `paras2s compile` plans for.
    c.topology = ""
    c.mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))
    c.decode_mesh = ConfigDict(dict(data=1, fsdp=1, tensor=1))
    c.rules = axes.TRAIN_RULES
    c.decode_rules = axes.DECODE_RULES

    # Speech, all at 16 kHz.
    c.synthesize = ConfigDict(
        dict(synthesizer="espeak", options={}, num_workers=2, sizes=dict(train_voices=4))
    )

    # "" for what is spoken here, or a folder with queries.jsonl and demonstrations.jsonl.
    c.data = ConfigDict(dict(folder=""))

    _add_parts(c, "train" if arg == "from_scratch" else "tiny")
    _add_policy(c)
    _add_supervision(c)
    _add_reinforcement(c)

    c.retention = ConfigDict(dict(betas=(0.0,)))
    c.bench = ConfigDict(
        dict(
            systems=("base", "sft", "sft_5x", "grpo"),
            batch_size=48,
            len_buckets_s=(3.2,),
            num_samples=2,
            use_labels=False,
            num_workers=2,
            num_probes=60,
            sentences_in_report=4,
        )
    )
    if arg == "quick":
        _shorten(c)
    return c


def _shorten(c: ConfigDict) -> None:
    # Fewer voices and takes, fewer steps, one answer a query.
    c.synthesize.sizes = ConfigDict(
        dict(
            sentences=0,
            train_voices=2,
            test_voices=1,
            polytone_texts=30,
            polytone_voices=4,
            plain_takes=1,
            contrary_takes=2,
            answer_takes=0,
            tone_texts=0,
        )
    )
    c.polytone.recipe.update(num_steps=80, warmup_steps=10)
    c.distill.update(num_queries=160, num_steps=120, warmup_steps=20)
    c.grpo.update(num_steps=24, warmup_steps=4, lr=2e-4)
    c.grpo.health.gap_every = 0
    c.bench.update(
        systems=("base", "sft", "grpo"), num_samples=1, num_probes=24, sentences_in_report=2
    )


def _add_parts(c: ConfigDict, source: str) -> None:
    # The small parts that everything else stands on.
    c.pretrain = ConfigDict()
    c.pretrain.source = source
    c.pretrain.text_vocab_size = 512
    c.pretrain.copies_of_others = 800
    c.pretrain.salad_clips = 2000
    c.pretrain.codec = ConfigDict(dict(num_codes=1024, num_answers=900, num_others=300))
    c.pretrain.asr = ConfigDict(
        dict(
            model=whisper(
                decoder_layers=2,
                decoder_attention_heads=4,
                decoder_ffn_dim=288,
                max_target_positions=64,
            ),
            recipe=dict(
                num_steps=1300, batch_size=48, lr=2e-3, warmup_steps=150,
                len_buckets_s=LEN_BUCKETS_S,
            ),
            vocab_size=384,
        )
    )  # fmt: skip
    c.pretrain.tone = ConfigDict(
        dict(
            model=whisper(
                d_model=64, encoder_layers=2, encoder_ffn_dim=192, classifier_proj_size=64
            ),
            recipe=dict(
                num_steps=500, batch_size=48, lr=1e-3, warmup_steps=50, len_buckets_s=LEN_BUCKETS_S
            ),
        )
    )

    # Style analyzers start from the recogniser's encoder.
    c.polytone = ConfigDict(
        dict(
            classifier_proj_size=64,
            recipe=dict(
                num_steps=200,
                batch_size=24,
                lr=8e-4,
                warmup_steps=20,
                augment_share=1.0,
                len_buckets_s=LEN_BUCKETS_S,
            ),
        )
    )


def _add_policy(c: ConfigDict) -> None:
    # The policy: a small Kimi-Audio. Text ids 0-511, specials 512-551, speech codes from 552.
    c.policy = ConfigDict()
    c.policy.checkpoint = ""  # the packaged base, or the folder of a converted Kimi-Audio
    c.policy.model = ConfigDict(
        dict(
            vocab_size=512 + 40 + 1024,
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_theta=10_000.0,
            bos_token_id=512,
            pad_token_id=551,
            kimia_mimo_layers=1,
            kimia_mimo_audiodelaytokens=6,
            kimia_mimo_transformer_from_layer_index=2,
            kimia_token_offset=552,
            kimia_adaptor_input_dim=4 * 96,
        )
    )
    c.policy.lora = ConfigDict(
        dict(
            rank=0,
            alpha=32.0,
            targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        )
    )
    c.policy.trainable = ""  # all; "^lora/" for adapters alone
    c.policy.dtype = "float32"
    c.policy.param_dtype = "float32"
    c.policy.max_steps = 44
    c.policy.scan_unroll = 1
    c.policy.remat = "none"
    c.policy.logp_chunk = 768
    c.policy.halvings = 0  # its answers are of similar lengths
    c.policy.rollout_options = ()  # for the compiler, as (name, value)
    c.policy.detokenizer = ConfigDict(dict(griffin_lim_iters=4, griffin_lim_rows=8))
    c.policy.text_sampling = ConfigDict(dict(temperature=1.0, top_k=0))
    c.policy.audio_sampling = ConfigDict(dict(temperature=0.5, top_k=0))


def _add_supervision(c: ConfigDict) -> None:
    c.base = ConfigDict(
        _DEMONSTRATIONS | dict(num_steps=600, neutral_repeats=5, len_buckets_s=(1.5, 2.0, 3.2, 3.6))
    )
    c.sft = ConfigDict(_DEMONSTRATIONS | dict(num_steps=60, num_demonstrations=60))
    c.sft_5x = ConfigDict(_DEMONSTRATIONS | dict(num_steps=150, num_demonstrations=300))


def _add_reinforcement(c: ConfigDict) -> None:
    c.judge = judge()
    c.distill = ConfigDict(
        _DEMONSTRATIONS
        | dict(
            num_queries=480,
            num_samples=4,
            sample_batch_size=16,
            text_sampling=dict(temperature=1.0, top_k=0),
            audio_sampling=dict(temperature=0.7, top_k=0),
            len_buckets_s=(3.2,),
            pair_buckets_s=(2.0, 3.2, 4.0),
            verdicts="",  # of the judge here, or the path of a jsonl of your own judge's
            swap_styles=True,
            held_out_share=0.15,
            num_steps=250,
            lr=1.5e-3,
            warmup_steps=40,
            trainable="lora|projector|audio_tower/proj/|language_model",
            findings_weight=0.5,
            model=reward_model(),
        )
    )
    c.grpo = ConfigDict(
        dict(
            group_size=8,
            beta=0.2,
            clip_low=0.2,
            clip_high=0.2,
            kl_estimator="k3",
            loss_type="grpo",
            scale_by_std=False,
            num_epochs=2,
            accum_steps=1,
            num_prompts=16,
            num_steps=60,
            lr=1.2e-4,
            warmup_steps=10,
            weight_decay=0.0,
            schedule="cosine",
            save_every=20,
            keep=2,
            keep_every=0,
            max_skipped=5,
            len_buckets_s=(3.2,),
            max_bad_share=0.01,
            audit_every=10,
            audit_prompts=4,
            # Alarms: see align/health.py. A run with alarms named in `stop` ends at the first.
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
                gap_every=20,
                gap_queries=16,
            ),
        )
    )
