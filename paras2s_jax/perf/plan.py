"""What compiled programs hold, copy and exchange: the decode loop and the update, on a slice.

Full width; loops over layers have one body, however many layers there are, so that few will do.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from ml_collections import ConfigDict

from paras2s_jax.models import axes
from paras2s_jax.models.placement import axes_of, dividing
from paras2s_jax.plan import aot, hlo, reading
from paras2s_jax.plan.counts import kv_bytes_per_token, num_layers
from paras2s_jax.plan.hardware import PlanError, topology_of
from paras2s_jax.plan.sizes import sizes_of
from paras2s_jax.plan.work import prompt_tokens
from paras2s_jax.stages.registry import Figures

UNITS = {"float32": 4, "bfloat16": 2}
PHASES = ("rollout", "update")


def run(config: ConfigDict, layers: int = 2, plan: str = "") -> Figures:
    """Reads both programs as they were compiled for the config's topology.

    plan: folder in which `paras2s compile` left them (WORKDIR/plan/grpo), of any size; its own
    config holds. Without it they are compiled here, of so many layers in each stack.

    Returns: plan/decode/* and plan/update/*, see `read_decode` and `read_update`.

    Raises:
        PlanError: there is no compiler, or the folder lacks one of the programs.
    """
    if plan:
        return _read(aot.read_config(_existing(Path(plan))), Path(plan))
    config = shallow(config, layers) if layers else config
    topology = topology_of(config.topology)
    aot.check_compiler(topology)
    with TemporaryDirectory(prefix="paras2s_plan_") as scratch:
        folder = Path(scratch)
        aot.write_config(config, folder)
        job = {"stage": "grpo", "topology": topology.name, "num_devices": topology.num_chips}
        for phase in PHASES:
            aot.run_worker(folder / phase, job | {"phase": phase}, dump=True)
        return _read(config, folder)


def _existing(folder: Path) -> Path:
    """A folder that holds both programs."""
    lacking = [name for name in PHASES if not (folder / name / aot.COMPILED).exists()]
    if lacking:
        raise PlanError(
            f"{folder} holds no compiled {lacking[0]}: make it with paras2s compile "
            f"--stage=grpo --phases={','.join(PHASES)}, and name WORKDIR/plan/grpo."
        )
    return folder


def _read(config: ConfigDict, folder: Path) -> Figures:
    rollout, update = (
        (
            aot.Compiled.load(folder / phase / aot.COMPILED),
            hlo.Program.load(aot.dumped(folder / phase / "hlo")),
        )
        for phase in PHASES
    )
    return read_decode(config, *rollout) | read_update(config, *update)


def shallow(config: ConfigDict, layers: int) -> ConfigDict:
    """The config with so many layers in each stack of the policy, and in the reward model."""
    made = ConfigDict(config.to_dict())
    made.policy.model.num_hidden_layers = 2 * layers
    made.policy.model.kimia_mimo_layers = layers
    made.policy.model.kimia_mimo_transformer_from_layer_index = layers - 1
    made.distill.model.text.num_hidden_layers = layers
    made.distill.model.audio.encoder_layers = layers
    return made


def read_decode(config: ConfigDict, made: aot.Compiled, program: hlo.Program) -> Figures:
    """Of the decode loop.

    temp_over_cache: temporaries beside the cache, in units of it; allreduces_per_layer and
    collectives_per_layer of one step; cache_copies: of a whole cache of one stack, in a step.
    """
    sizes, steps = sizes_of(config), config.policy.max_steps
    rows = config.grpo.num_prompts * config.grpo.group_size
    devices = math.prod(config.decode_mesh.to_dict().values())
    ways = _ways(config, rows)
    item = UNITS[config.policy.dtype]
    answers = kv_bytes_per_token(sizes.policy, item) * rows * steps / ways
    # Prompts are run once for their group, and are too few for all devices.
    prompts = config.grpo.num_prompts
    heard = prompt_tokens(max(config.grpo.len_buckets_s)) * prompts
    heard *= kv_bytes_per_token(sizes.policy, item)
    cache = answers + heard / _ways(config, prompts)
    layers, body = num_layers(sizes.policy), reading.decode_body(program, steps)
    shortest = min(sizes.policy.stack_sizes.values())
    one_stack = round(answers / 2 * shortest / layers)
    count = {
        "allreduces_per_layer": ("all-reduce",),
        "collectives_per_layer": (*reading.GATHERS, "collective-permute"),
    }
    return {
        "plan/decode/temp_over_cache": (made.memory.temps - cache) / cache,
        "plan/decode/cache_mib": cache / 2**20,
        "plan/decode/spread": ways / devices,
        "plan/decode/cache_copies": len(reading.cache_copies(program, body, steps, one_stack)),
        **{
            f"plan/decode/{name}": reading.per_layer(program, body, steps, layers, opcodes)
            for name, opcodes in count.items()
        },
    }


def _ways(config: ConfigDict, rows: int) -> int:
    """Over how many devices keys and values of so many rows are spread, by rows and by heads."""
    mesh, rules = config.decode_mesh, dict(config.decode_rules)
    ways = 1
    for size, name in (
        (rows, axes.ACT_ATTN_BATCH),
        (sizes_of(config).policy.num_key_value_heads, axes.ACT_KV_HEADS),
    ):
        ways *= math.prod(mesh[axis] for axis in dividing(axes_of(rules.get(name)), size, mesh))
    return ways


def read_update(config: ConfigDict, made: aot.Compiled, program: hlo.Program) -> Figures:
    """Of the update.

    logits_over_chunk: float32 rows of logits in one array on one device, in units of a chunk's;
    head_gathers: how often one gather of a head runs in a micro-batch, at the most: once, or once
    per chunk.
    """
    c, mesh = sizes_of(config).policy, config.mesh
    columns = [c.vocab_size, c.vocab_size // mesh.tensor]
    ways = mesh.data * mesh.fsdp
    widths = [c.hidden_size // size for size in (1, mesh.data, mesh.fsdp, ways)]
    rows = reading.largest_logits(program, columns, widths)
    head = c.vocab_size * c.hidden_size * UNITS[config.policy.dtype] // mesh.tensor
    found = reading.heads_gathered(program, head)
    gathers = [gather.times / config.grpo.accum_steps for gather in found]
    return {
        "plan/update/logits_over_chunk": rows / config.policy.logp_chunk,
        "plan/update/head_gathers": max(gathers, default=0.0),
        "plan/update/wire_gb": sum((made.wire or {}).values()) / 1e9,
    }
