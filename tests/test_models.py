"""Models, weights and checkpoints as users bring them: each trap is a test that asserts what comes of it."""

import io
import json
import os
import pickle
import shutil
import signal
import time

import huggingface_hub
import lpips_weights
import numpy as np
import pytest
import torch
from conftest import stops_with, tiny_ldm, unreachable
from diffusers import DDIMScheduler

import ppo_ldm_sr as orl

CPU = torch.device("cpu")
rng = np.random.default_rng(0)


# ---------------------------------------------------------------- models


def test_an_ldm_that_cannot_be_used_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    tiny_ldm(tmp_path / "ldm")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("runs/nothing_here", "nobody/has-this-ldm"):
        with stops_with(capsys, name, "folder"):
            orl.load_ldm(name, CPU)
    weights = tmp_path / "ldm/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with stops_with(capsys, tmp_path / "ldm"):
        orl.load_ldm(str(tmp_path / "ldm"), CPU)
    shutil.rmtree(tmp_path / "ldm/vqvae")
    with stops_with(capsys, tmp_path / "ldm", "vqvae/"):
        orl.load_ldm(str(tmp_path / "ldm"), CPU)


BETAS = {"beta_start": 0.0015, "beta_end": 0.0155, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def test_a_ddim_config_that_leaves_keys_out_means_what_diffusers_means_by_them(tmp_path):
    tiny_ldm(tmp_path)
    file, fingerprints = tmp_path / "scheduler/scheduler_config.json", set()
    for named in ({"clip_sample": False}, {}):  # CompVis' own leaves out prediction type, spacing and final alpha
        config = {"_class_name": "DDIMScheduler", **BETAS, "timestep_values": None, **named}
        file.write_text(json.dumps(config))
        ldm, stock = orl.load_ldm(str(tmp_path), CPU), DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
        assert dict(ldm.scheduler.config) == dict(stock.config)
        assert torch.equal(ldm.alphas, stock.alphas_cumprod) and ldm.final_alpha == stock.final_alpha_cumprod
        fingerprints.add(ldm.fingerprint)
    assert len(fingerprints) == 2  # an agent belongs to the noise schedule too


FOREIGN = [{"_class_name": "PNDMScheduler"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": ""}]
FOREIGN += [{"thresholding": True}, {"prediction_type": "flow"}]


@pytest.mark.parametrize("change", FOREIGN)
def test_the_scheduler_config_of_another_class_or_method_is_refused_in_one_sentence(tmp_path, capsys, change):
    tiny_ldm(tmp_path)
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, **BETAS}
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config | change))
    with pytest.raises(SystemExit) as error:
        orl.load_ldm(str(tmp_path), CPU)
    said = capsys.readouterr().out
    assert error.value.code == 2 and said.count("error:") == 1 and len(said.splitlines()) == 1
    assert str(tmp_path) in said and (change.get("_class_name") or "") in said


def test_code_in_a_pickle_is_never_run(tmp_path, capsys):
    class Folder:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    tiny_ldm(tmp_path / "ldm").save_pretrained(tmp_path / "bin", safe_serialization=False)
    torch.save({"conv_in.weight": Folder()}, tmp_path / "bin/unet/diffusion_pytorch_model.bin")
    with stops_with(capsys, tmp_path / "bin"):
        orl.load_ldm(str(tmp_path / "bin"), CPU)
    torch.save({"agent": Folder(), "args": {}}, tmp_path / "agent.pt")
    with stops_with(capsys, tmp_path / "agent.pt"):
        orl.load_run(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        lpips_weights.ArraysOnly(io.BytesIO(pickle.dumps({"AlexNet_0": Folder()}))).load()
    assert not (tmp_path / "it ran").exists()


def test_an_agent_of_another_ldm_or_version_and_a_damaged_file_are_refused(tmp_path, ldm_folder, capsys):
    ldm, file = orl.load_ldm(str(ldm_folder), CPU), tmp_path / "agent.pt"
    agent = orl.Agent(torch.rand(3), 8)
    state = {"ldm": ldm.fingerprint, "args": {"ldm": "x"}, "agent": agent.state_dict()}
    orl.save_run(file, state)
    loaded = orl.load_agent(orl.load_run(tmp_path), ldm)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), state["agent"].values(), strict=True))
    assert file.stat().st_mode & 0o044 == 0o044  # colleagues may read it
    with stops_with(capsys, "another LDM", "--ldm"):
        orl.load_agent(state | {"ldm": "0" * 12}, ldm)
    file.rename(tmp_path / "checkpoint.pt")  # of a run that was stopped before its first evaluation
    assert orl.load_agent(orl.load_run(tmp_path), ldm)
    for content in (state, state | {"version": 4}):  # of the versions before
        torch.save(content, file)
        with stops_with(capsys, file, "version"):
            orl.load_run(tmp_path)
    file.write_bytes((tmp_path / "checkpoint.pt").read_bytes()[:1000])
    with stops_with(capsys, file):
        orl.load_run(tmp_path)
    with stops_with(capsys, "nowhere"):
        orl.load_run(tmp_path / "nowhere")


# ---------------------------------------------------------------- LPIPS


@pytest.mark.parametrize("content", ["text", "wrong tensors", "half"])
def test_a_wrong_file_of_alexnets_name_is_refused(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    torch.save({"features.0.weight": torch.zeros(300)}, file)
    if content != "wrong tensors":
        file.write_bytes(b"not a file of torch" if content == "text" else file.read_bytes()[:1000])
    with stops_with(capsys, file.parent, "delete"):
        orl.load_lpips(CPU)


def test_without_any_source_lpips_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    monkeypatch.setattr(lpips_weights, "fetch", unreachable)
    assert orl.load_lpips(CPU) is None and len(capsys.readouterr().out.splitlines()) == 1


# ---------------------------------------------------------------- checkpoints


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    """SIGKILL at 20 random moments of a process that does nothing but save."""
    agent, file, steps = orl.Agent(torch.ones(8), 64), tmp_path / "checkpoint.pt", []
    orl.save_run(file, {"agent": agent.state_dict(), "args": {"seed": 1}, "step": -1})
    for _ in range(20):
        before = file.stat().st_mtime_ns
        if not (child := os.fork()):
            torch.set_num_threads(1)
            for step in range(10_000):
                for value in agent.parameters():
                    value.data.fill_(step)
                orl.save_run(file, {"agent": agent.state_dict(), "args": {"seed": 1}, "step": step})
        while file.stat().st_mtime_ns == before:  # this process has saved once
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state, names = orl.load_run(file), dict(agent.named_parameters())
        assert all((state["agent"][k] == state["step"]).all() for k in names)  # all of one moment
        steps.append(state["step"])
    assert min(steps) >= 0 and max(steps) > 0


def test_a_full_disk_is_one_sentence_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(28, "No space left on device")

    file, content = tmp_path / "checkpoint.pt", {"agent": {"w": torch.ones(3)}, "args": {"seed": 1}}
    orl.save_run(file, content | {"step": 100})
    with monkeypatch.context() as patch, stops_with(capsys, file):
        patch.setattr(type(file), "write_bytes", full)
        orl.save_run(file, content | {"step": 200})
    assert orl.load_run(file)["step"] == 100
