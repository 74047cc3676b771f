"""Whole trainings, as a user starts, stops, moves and continues them: tiny models, seconds each."""

import ast
import dataclasses
import importlib
import io
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rehearsal
import torch
import tyro
from conftest import ROOT, SHARED, SMALL, TOOLS, interrupt, nothing, refused, run, tiny_ldm
from diffusers import DDIMScheduler, PNDMScheduler
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_ldm_sr as orl

CPU, NAN = torch.device("cpu"), float("nan")


@pytest.fixture
def flags(tmp_path, ldm_folder):
    """The `trained` fixture's flags, for a run in tmp_path/run."""
    return ["--run-dir", tmp_path / "run", "--ldm", ldm_folder, "--total-timesteps", 30, *SMALL]


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained[0], tmp_path / "copied")


def curves(folder):
    """{tag: its steps} of a training, in the order in which TensorBoard shows them; not those of the table after it."""
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "table/" not in tag]
    return {tag: [event.step for event in events.Scalars(tag)] for tag in tags}


def assert_good(file, iteration):
    saved = orl.load_run(file)
    assert saved["iteration"] == iteration and all(v.isfinite().all() for v in saved["agent"].values())


def test_a_run_leaves_an_agent_a_checkpoint_a_table_and_curves_that_begin_with_the_untrained_agent(trained):
    folder, said = trained
    assert "data: synthetic scenes, train: 32 images, 2 of 8 scene(s)" in said
    for name in ("checkpoint.pt", "agent.pt", "table.md", "table.csv"):
        assert (folder / name).stat().st_size > 0, name
    curve = curves(folder)
    assert {"charts/episodic_return", "charts/nfe", "losses/approx_kl", "reward/ssim", "eval/psnr_agent"} <= set(curve)
    first, second = curve["charts/SPS"]
    assert 16 <= first <= 24 and 16 <= second - first <= 24
    assert curve["eval/reward_agent"] == curve["eval/reward_unsteered"] == [0, first, second]


def test_a_run_of_the_same_seed_that_stopped_and_went_on_is_the_same_bit_for_bit(trained, tmp_path, flags, train):
    """`trained` ran in another process and never stopped."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # as many as that process had
    folder = tmp_path / "my run"
    said = train(interrupt, *flags, "--run-dir", folder, code=130)
    assert_good(folder / "checkpoint.pt", 1)
    train(nothing, *shlex.split(said.split("go on with python ppo_ldm_sr.py ")[1].splitlines()[0]))
    one, two = (orl.load_run(path / "checkpoint.pt") for path in (trained[0], folder))
    assert all(torch.equal(one["agent"][k], two["agent"][k]) for k in one["agent"])
    one, two = one["optimizer"], two["optimizer"]
    assert one["param_groups"] == two["param_groups"] and len(one["state"]) == len(two["state"]) > 10
    assert all(torch.equal(moments[k], two["state"][i][k]) for i, moments in one["state"].items() for k in moments)
    assert curves(folder) == curves(trained[0])


@pytest.mark.parametrize("flag, values", [
    ("gamma", [0.5]), ("gamma", [0.99001]), ("scenes", ["river"]), ("run_dir", ["elsewhere"]), ("mtf", [0.29]),
    ("seed", [43]), ("crop", [48]), ("reward_weights", [1, 0, 0, 0]), ("agent", ["runs/orl_ldm"]),
])  # fmt: skip
def test_what_would_change_a_resumed_run_is_refused(copied, capsys, flag, values):
    assert flag in refused(capsys, orl, "--resume", copied, f"--{flag.replace('_', '-')}", *values)


def test_a_default_counts_if_it_is_given_and_a_damaged_checkpoint_is_refused(copied, capsys):
    file, state = copied / "checkpoint.pt", orl.load_run(copied / "checkpoint.pt")
    orl.save_run(file, state | {"args": state["args"] | {"seed": 43}})
    assert "seed" in refused(capsys, orl, "--resume", copied, "--seed", 42)
    file.write_bytes(file.read_bytes()[:2000])
    assert "damaged" in refused(capsys, orl, "--resume", copied)
    assert "missing" in refused(capsys, orl, "--resume", copied.parent)


def test_a_run_goes_on_after_all_has_moved(tmp_path, ldm_folder, image_folder, train, monkeypatch, capsys):
    """It begins with relative paths; then the working folder changes, and run folder, images and LDM are moved."""
    home, flags = tmp_path / "job_1", ["--dataset", "data", "--ldm", "model", "--total-timesteps", 150, *SMALL]
    shutil.copytree(image_folder, home / "data")
    shutil.copytree(ldm_folder, home / "model")
    monkeypatch.chdir(home)
    train(interrupt, "--run-dir", "run", *flags, code=130)
    monkeypatch.chdir(tmp_path)
    folder = shutil.move(home / "run", tmp_path / "moved")
    train(interrupt, "--resume", folder, code=130)
    for flag, old, new in (("--dataset", home / "data", "data_2"), ("--ldm", home / "model", "model_2")):
        shutil.move(old, tmp_path / new)
        assert flag in refused(capsys, orl, "--resume", folder)
        train(interrupt, "--resume", folder, flag, new, code=130)
    train(interrupt, "--resume", folder, code=130)  # it remembers the new places
    assert_good(folder / "checkpoint.pt", 5)


@pytest.mark.parametrize("what", ["train", "test", "model"])
def test_another_content_under_the_same_names_is_refused(copied, tmp_path, ldm_folder, capsys, what):
    data = shutil.copytree(ROOT / "runs/scenes", tmp_path / "data")
    model = tmp_path / "model" if what == "model" else ldm_folder
    if what == "model":
        tiny_ldm(model, prediction_type="v_prediction")
    else:
        one, *_, two, _ = sorted((data / what / "river").iterdir())
        shutil.copy(one, two)
    refused(capsys, orl, "--resume", copied, "--dataset", data, "--ldm", model)


def start(*flags):
    """The script in a process of its own, in which a signal can be sent to it."""
    command = [sys.executable, str(ROOT / "ppo_ldm_sr.py"), *map(str, flags)]
    env = {"OMP_NUM_THREADS": "2", **os.environ}
    return subprocess.Popen(command, text=True, env=env, stdout=subprocess.PIPE)


def test_sigterm_after_a_checkpoint_stops_the_run_as_ctrl_c_does(tmp_path, flags, train):
    job = start(*flags, "--total-timesteps", 10_000)
    while not (tmp_path / "run/checkpoint.pt").is_file() and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert f"--resume {tmp_path / 'run'}" in job.communicate(timeout=60)[0] and job.returncode == 130
    step = orl.load_run(tmp_path / "run/checkpoint.pt")["step"]
    train(nothing, "--resume", tmp_path / "run", "--total-timesteps", step + 20)
    steps = curves(tmp_path / "run")["charts/SPS"]
    assert steps == sorted(set(steps)) and step in steps and steps[-1] > step


def test_after_sigterm_before_the_first_checkpoint_the_same_command_begins_again(tmp_path, flags, train):
    job = start(*flags)
    assert any(line.startswith("run:") for line in job.stdout)  # reads as far as that line
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 130 and not any((tmp_path / "run").glob("*.pt"))
    train(interrupt, *flags, code=130)


@pytest.mark.parametrize("moment", ["as the folder is named", "in the first rollout"])
def test_after_ctrl_c_before_the_first_checkpoint_the_same_command_begins(tmp_path, flags, train, monkeypatch, moment):
    class Console(io.StringIO):
        def write(self, text):
            return interrupt() if text.startswith("run:") else super().write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Console() if "folder" in moment else sys.stdout)
        try:
            train(interrupt if "rollout" in moment else nothing, *flags, before=1, code=130)
        except KeyboardInterrupt:  # would end pytest
            pytest.fail("a traceback")
    train(interrupt, *flags, code=130)


@pytest.mark.parametrize("rank, size", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_one_of_several_processes_is_refused(tmp_path, flags, train, monkeypatch, capsys, rank, size):
    """torchrun and srun tell every process its number; a job of several tasks without them is one process."""
    monkeypatch.setenv(size, "2")
    with monkeypatch.context() as patch:
        patch.setenv(rank, "1")
        refused(capsys, orl, *flags)
    assert not (tmp_path / "run").exists()
    train(interrupt, *flags, code=130)


def test_two_runs_that_begin_at_the_same_moment_do_not_share_a_folder(tmp_path, flags, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    flags = [*flags[2:], "--dataset", ROOT / "runs/scenes"]  # no --run-dir
    train(interrupt, *flags, code=130)
    try:
        train(interrupt, *flags, code=130)
    except AssertionError as refusal:  # of another exit code
        assert str(refusal).count("error: ") == 1
    assert [len([*folder.glob("events.*")]) for folder in (tmp_path / "runs").iterdir()] in ([1], [1, 1])


def test_the_file_alone_trains_and_its_log_has_a_line_an_evaluation(tmp_path, ldm_folder, image_folder):
    shutil.copy(ROOT / "ppo_ldm_sr.py", tmp_path)
    flags = ["--ldm", ldm_folder, "--dataset", image_folder, "--run-dir", "out", "--total-timesteps", 50, *SMALL]
    command = [sys.executable, "ppo_ldm_sr.py", *map(str, flags), "--eval-every", "2"]
    with open(tmp_path / "log.txt", "w") as log:
        code = subprocess.run(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, timeout=280).returncode
    log, curve = (tmp_path / "log.txt").read_bytes().decode(), curves(tmp_path / "out")
    assert code == 0 and (tmp_path / "out/agent.pt").is_file(), log
    assert [int(step) for step in re.findall(r"^step (\d+)", log, re.MULTILINE)] == curve["eval/reward_agent"][1:]
    assert len(curve["charts/SPS"]) == 3 and "\r" not in log and max(map(len, log.splitlines())) < 500


def test_the_file_imports_nothing_of_ours_but_the_weights_where_they_lie_beside_it():
    nodes = [*ast.walk(ast.parse((ROOT / "ppo_ldm_sr.py").read_text("utf-8")))]
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert names & {file.stem for folder in (ROOT, TOOLS) for file in folder.glob("*.py")} == {"lpips_weights"}


def test_a_notebooks_output_which_cannot_be_reconfigured_will_do(flags, train, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    train(interrupt, *flags, code=130)
    assert "run:" in sys.stdout.getvalue()


SPOIL = {  # with the first of the arguments of `rollout`
    "LDM": lambda env, *_: next(env.ldm.unet.parameters()).data.fill_(float("inf")),
    "agent": lambda env, agent, *_: next(agent.critic.parameters()).data.fill_(NAN),
    "reward": lambda *rest: setattr(rest[4], "reward_weights", (NAN, NAN, NAN, NAN)),
}


@pytest.mark.parametrize("what", SPOIL)
def test_nan_stops_the_run_with_a_sentence_and_leaves_the_last_good_checkpoint(tmp_path, flags, what, train):
    said = train(SPOIL[what], *flags, code=2)
    assert said.count("error: ") == 1 and str(tmp_path / "run/checkpoint.pt") in said
    for name in ("checkpoint.pt", "agent.pt"):
        assert_good(tmp_path / "run" / name, 1)


@pytest.mark.parametrize("rate", ["1e3", "1e30"])
def test_a_learning_rate_that_breaks_the_agent_is_named_and_leaves_no_broken_checkpoint(tmp_path, flags, rate, train):
    said = train(nothing, *flags, "--learning-rate", rate, "--actor-learning-rate", rate, code=2)
    assert "--learning-rate" in said.split("error: ")[1] and not [*(tmp_path / "run").glob("*.pt*")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard writes in a thread
@pytest.mark.parametrize("room", [0, 200_000])  # bytes a file: none for the curves, too few for the checkpoint
def test_a_full_disk_ends_in_a_sentence_and_leaves_the_last_good_checkpoint(tmp_path, flags, train, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        said = train(lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1])), *flags, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.count("error: ") == 1 and "cannot be written" in said
    assert_good(tmp_path / "run/checkpoint.pt", 1)
    train(nothing, "--resume", tmp_path / "run")
    assert_good(tmp_path / "run/checkpoint.pt", 2)


@pytest.mark.parametrize("flag, values", [
    ("--total-timesteps", [-1]), ("--total-timesteps", [0]), ("--num-envs", [3]), ("--num-minibatches", [0]),
    ("--update-epochs", [0]), ("--base-steps", [0]), ("--base-steps", [1001]), ("--max-nfe", [0]), ("--crop", [0]),
    ("--crop", [32]), ("--crop", [50]), ("--eval-every", [0]), ("--eval-images", [-1]), ("--seed", [-1]),
    ("--seed", [2**64]), ("--gamma", [2.0]), ("--gae-lambda", [NAN]), ("--learning-rate", [-1.0]), ("--mtf", [0.0]),
    ("--mtf", [1.0]), ("--lr-noise", [-1.0]), ("--edit-std", [NAN]), ("--reward-scale", [0.0]),
    ("--reward-weights", [0, 0, 0, 0]), ("--dataset", ["not/to/be/found"]), ("--ldm", ["not/to/be/found"]),
    ("--scenes", ["volcano"]), ("--agent", ["runs/scenes"]), ("--run-dir", [ROOT / "README.md/run"]),
    pytest.param("--device", ["cuda"], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
])  # fmt: skip
def test_a_bad_setting_ends_in_one_sentence_before_anything_is_written(tmp_path, flags, capsys, flag, values):
    said = refused(capsys, orl, *flags, flag, *values).split("error: ")[1]
    assert (flag in said or str(values[0]) in said) and not any(tmp_path.iterdir())


def test_images_too_small_for_the_crop_are_taken_with_the_crop_that_is_named(tmp_path, flags, train, capsys):
    for scene, side in (("river", 48), ("desert", 64)):
        (tmp_path / "data" / scene).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(tmp_path / "data" / scene / f"{k}.png")
    flags += ["--dataset", tmp_path / "data"]
    crop = re.search(r"--crop can be as small as (\d+)", refused(capsys, orl, *flags))[1]
    assert "train: 4 images, 2 of 2 scene(s)" in train(interrupt, *flags, "--crop", crop, code=130)


def test_a_scheduler_that_is_refused_can_be_written_as_the_one_that_is_named(tmp_path, capsys):
    betas = {"beta_start": 0.002, "beta_end": 0.01, "beta_schedule": "linear"}
    tiny_ldm(tmp_path)
    PNDMScheduler(**betas).save_config(tmp_path / "scheduler")
    assert "DDIMScheduler" in refused(capsys, orl, "--ldm", tmp_path)
    DDIMScheduler(**betas, prediction_type="epsilon", clip_sample=False).save_config(tmp_path / "scheduler")
    assert torch.equal(orl.load_ldm(str(tmp_path), CPU).alphas, PNDMScheduler(**betas).alphas_cumprod)


def test_without_weights_of_lpips_what_needs_them_is_refused(tmp_path, flags, monkeypatch, capsys, train):
    monkeypatch.setattr(orl, "load_lpips", lambda *_: None)
    assert "--reward-weights" in refused(capsys, orl, *flags, "--reward-weights", 0, 0, 1, 0)
    assert not (tmp_path / "run").exists()
    train(interrupt, *flags, code=130)


def test_a_finished_run_goes_on_with_a_larger_budget_and_its_rates_are_annealed_to_that(copied, train):
    step = orl.load_run(copied)["step"]
    train(nothing, "--resume", copied, "--total-timesteps", step + 5)
    longer, left = orl.load_run(copied / "checkpoint.pt"), 1 - step / (step + 5)
    rates = [group["lr"] / left for group in longer["optimizer"]["param_groups"]]
    assert longer["step"] > step and rates == pytest.approx([1e-3, 1e-3, 3e-4])  # editor, critic, actor


def test_a_new_run_begins_with_the_agent_of_another(trained, tmp_path, flags, image_folder, train, capsys):
    began, first = {}, orl.load_run(trained[0])["agent"]

    def look(env, agent, *_):
        began.update({k: v.clone() for k, v in agent.state_dict().items() if k != "edit_std"})  # annealed anew

    flags += ["--dataset", image_folder, "--agent", trained[0]]
    train(look, *flags, "--total-timesteps", 10, before=1)
    assert len(began) > 10 and all(torch.equal(v, first[k]) for k, v in began.items())
    assert not torch.equal(orl.load_run(tmp_path / "run")["agent"]["editor.0.weight"], began["editor.0.weight"])
    tiny_ldm(tmp_path / "other", latent_channels=4)
    assert "--agent" in refused(capsys, orl, *flags, "--run-dir", tmp_path / "never", "--ldm", tmp_path / "other")
    assert not (tmp_path / "never").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_run_trains_end_to_end_and_goes_on(tmp_path):
    said = run("ppo_ldm_sr.py", "--run-dir", tmp_path / "cuda", "--total-timesteps", 2000, "--eval-images", 8)
    assert torch.cuda.get_device_name() in said and (tmp_path / "cuda/table.csv").is_file()
    run("ppo_ldm_sr.py", "--resume", tmp_path / "cuda", "--total-timesteps", 3000, "--device", "cuda")


def test_an_iteration_stays_on_its_device_and_waits_for_it_as_seldom_as_can_be(flags, train, monkeypatch):
    """On a rehearsed accelerator. Once, beside asking at every function evaluation which images go on."""
    off, rollout, waits, nfe = torch.autocast("cpu", enabled=False), orl.rollout, [], []
    monkeypatch.setattr(torch, "autocast", lambda *rest, **more: off)
    monkeypatch.setattr(orl, "has_bf16", lambda device: False)
    monkeypatch.setattr(orl, "pick_device", lambda name: rehearsal.DEVICE)
    monkeypatch.setattr(orl, "save_run", nothing)  # it copies to the CPU, as it should
    monkeypatch.setattr(rehearsal.There, "tolist", lambda tensor: tensor.cpu().tolist(), raising=False)

    def counted(*rest):
        waits.append(seen.waits.copy())
        batch, infos = rollout(*rest)
        assert {v.device for v in [*batch.values(), *infos.values()]} == {rehearsal.DEVICE}
        nfe.append(int(infos["nfe"].inner.max()))
        return batch, infos

    monkeypatch.setattr(orl, "rollout", counted)
    with rehearsal.Rehearsal() as seen:
        train(nothing, *flags, "--update-epochs", 1, "--eval-every", 9)
    assert len(waits) == 2 and not seen.mixed, seen.mixed
    assert 1 <= (waits[1] - waits[0]).total() <= nfe[0] + 1, waits[1] - waits[0]


def test_the_shipped_agent_keeps_its_gain_over_the_unsteered_ldm():
    """In reward, over as many function evaluations with the same back-projection, which an untrained agent equals;
    and over the 100 steps of the stock pipeline in PSNR and SSIM. An image a scene."""
    saved, real = orl.load_run(ROOT / "runs/orl_ldm"), SHARED / "data/paper8"
    ldm, lpips_fn = orl.load_ldm(saved["args"]["ldm"], CPU), orl.load_lpips(CPU)
    images = orl.load_images(str(real if real.is_dir() else ROOT / "runs/scenes"), "test", (), 128, CPU)
    hr = torch.stack([images.centre(images.labels.index(k), 1, 128) for k in range(len(images.scenes))])
    sensor, n = orl.Sensor(saved["args"]["mtf"], saved["args"]["lr_noise"]), range(len(hr))
    z_T = orl.noise_for(n, (ldm.latent_channels, 32, 32), 0, CPU)
    lr = sensor.sense(hr, orl.noise_for(n, (3, 32, 32), 1_000_000, CPU))
    env = orl.DenoisingEnv(ldm, saved["args"]["base_steps"], saved["args"]["max_nfe"], sensor)
    sr, nfe, _ = env.super_resolve(lr, z_T, orl.load_agent(saved, ldm))
    same = torch.zeros_like(sr)
    for k in nfe.unique().tolist():
        same[nfe == k] = orl.DenoisingEnv(ldm, k, k, sensor).super_resolve(lr[nfe == k], z_T[nfe == k])[0]
    agent, same = (orl.score(lpips_fn, image, hr, nfe.float()) for image in (sr, same))
    gain = agent["reward"] - same["reward"]
    assert gain.mean() > 0.01 and (gain > 0).float().mean() > 0.8
    stock = orl.DenoisingEnv(ldm, 100, 100, sensor).super_resolve(lr[::2], z_T[::2], back_projection=False)[0]
    stock = orl.score(lpips_fn, stock, hr[::2], torch.full((len(stock),), 100.0))
    for figure, least in (("psnr", 1), ("ssim", 0.04), ("reward", 0.02)):
        assert (agent[figure][::2] - stock[figure]).mean() > least, figure


@pytest.mark.parametrize("name", ["ppo_ldm_sr", "eval_sr", "upscale_sr", "pretrain_ldm"])
def test_help_shows_every_flag_with_a_sentence_and_its_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    script = importlib.import_module(name)
    with pytest.raises(SystemExit):
        tyro.cli(script.Args, description=script.__doc__, args=["--help"])
    said = capsys.readouterr().out
    for field in dataclasses.fields(script.Args):
        if field.default is not dataclasses.MISSING:  # else it is no flag, but named after the script
            entries = re.findall(rf"^\W*--{field.name.replace('_', '-')}\b.*(?:\n\W*[^-\W].*)*", said, re.MULTILINE)
            assert len(entries) == 1 and "(default: " in entries[0] and len(entries[0].split()) > 6, field.name


def test_every_choice_that_the_code_marks_is_listed_for_the_reader():
    """In docs/reading.md, in nearly the same words."""
    words = lambda text: set(re.findall(r"\w+", text.lower()))  # noqa: E731
    entries = re.findall(r"^- (.*(?:\n  .*)*)", (ROOT / "docs/reading.md").read_text("utf-8"), re.MULTILINE)
    choices = re.findall(r"# choice: (.*)", (ROOT / "ppo_ldm_sr.py").read_text("utf-8"))
    assert len(choices) >= 8
    for choice in map(words, choices):
        assert max(len(choice & words(entry)) / len(choice) for entry in entries) > 0.7, choice
