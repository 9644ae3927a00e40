"""The JobSet manifest against the schemas of Kubernetes and of JobSet."""

import copy

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from tests.launch.conftest import LAUNCH, STAGE

KUBERNETES = "1.33"


def manifest(shell, topology="v5p-4x4x4", *flags) -> dict:
    done = shell.run(
        LAUNCH / "gke/jobset.sh",
        "--dry-run",
        "--name=run1",
        f"--topology={topology}",
        "--image=reg/im:1",
        "--claim=share",
        *flags,
        *STAGE,
    )
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert (first, last) == ("kubectl apply -f - <<'EOF'", "EOF")
    return yaml.safe_load("\n".join(lines))


def _is_within(found, known) -> bool:
    """Whether all that was found is known: the models drop keys of other names, add defaults."""
    if isinstance(found, dict):
        return all(key in known and _is_within(found[key], known[key]) for key in found)
    if isinstance(found, list):
        return len(found) == len(known) and all(map(_is_within, found, known))
    return found == known


def check(found: dict) -> None:
    """Raises ValueError or kubernetes_validate.ValidationError where a schema is violated."""
    known = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(found)).to_dict()
    if not _is_within(found, known):
        raise ValueError("keys that JobSet does not know")
    for job in found["spec"]["replicatedJobs"]:
        alone = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        kubernetes_validate.validate(alone | job["template"], KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "topology, accelerator, num_vms",
    [
        ("v5e-8x8", "tpu-v5-lite-podslice", 16),
        ("v5e-16x16", "tpu-v5-lite-podslice", 64),
        ("v5p-4x4x4", "tpu-v5p-slice", 16),
        ("v6e-8x8", "tpu-v6e-slice", 16),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--spot", "--max-restarts=0")])
def test_the_manifest_fits_the_schemas(shell, topology, accelerator, num_vms, flags):
    found = manifest(shell, topology, *flags)
    check(found)
    assert found["spec"]["failurePolicy"]["maxRestarts"] == (0 if flags else 5)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == num_vms
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition("-")[2],
    } | ({"cloud.google.com/gke-spot": "true"} if flags else {})
    assert pod["containers"][0]["args"] == list(STAGE[1:])
    # All chips of the slice.
    sides = map(int, topology.partition("-")[2].split("x"))
    chips = 1
    for side in sides:
        chips *= side
    assert num_vms * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


def test_a_stage_that_was_stopped_begins_again_uncounted(shell):
    spec = manifest(shell)["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [75]
    assert "exit 75" in (LAUNCH / "stage.sh").read_text()
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def _misspelt(found):
    found["spec"]["failurePolicy"]["maxRestart"] = 1


def _mistyped(found):
    found["spec"]["replicatedJobs"][0]["replicas"] = "one"


def _misspelt_in_pod(found):
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["containers"][0]["arg"] = []


def _mistyped_in_job(found):
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "many"


@pytest.mark.parametrize("spoil", [_misspelt, _mistyped, _misspelt_in_pod, _mistyped_in_job])
def test_the_schemas_tell_wrong_manifests(shell, spoil):
    found = manifest(shell)
    spoil(found)
    with pytest.raises((ValueError, kubernetes_validate.ValidationError)):
        check(found)
