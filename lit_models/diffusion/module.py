"""Training of text-to-waveform diffusion under the Trainer."""

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_models.base import all_reduce_sum
from lit_models.diffusion import draws, functional
from lit_models.diffusion.checks import check_batch, deviation
from lit_models.diffusion.evaluation import Evaluation, SampleMetrics
from lit_models.diffusion.generation import Batch, WaveformGenerator, first_rows, full_precision, rows_of
from lit_models.diffusion.network import NetworkInput, WaveformNet, forward_flops
from lit_models.diffusion.options import Sampling, Times, WaveformLoss
from lit_models.diffusion.recipes import WaveformBackbone
from lit_models.diffusion.text import TextCache, TextRecipe, resolve_pooling, text_width, tokenize
from lit_models.nn.groups import GroupOptions
from lit_models.nn.sharding import Sharding

QUIET = 0.05
"""Deviation of scaled sound below which most times show nothing but noise."""
_PARTS = 4  # of [0, 1] whose losses are told apart


class LitWaveform(WaveformGenerator):
    """Train a network to turn noise into sound that fits a text.

    Batch, of B clips of T samples in C channels:

    * audio: (B,C,T) float32
    * text: list[str], for models with a text encoder
    * valid_length: (B,) int64, samples before the padding of a clip; needed for `loss.mask` only
    * embedding: (B,E) float32, for networks that read a vector, such as a class, and no text
    * index, columns: numbers and facts of the clips, for metrics and predictions

    To predict, `text` is enough, with or without `seconds` (B), the lengths to generate.

    The loss is the squared error of the velocity, the mean over all values of an optimizer step on all ranks and in all
    accumulated batches. The n-th sample of a run has its own time, noise and chance of losing its text, which depend on
    the seed and n alone: ranks draw different times, two ranks train as one does with the same global batch, and a
    resumed run goes on as the whole run would have. For that, ranks must take turns in the rows of a global batch.

    Validation looks at fixed times with fixed noise. Where `callbacks.EMA` keeps an average, it covers all that is
    trained, and is what is validated, tested, sampled and exported.

    If you use this module in your research, please cite:

    * https://arxiv.org/abs/2302.04456

    Args:
        backbone: the network.
        text: text encoder; null for none.
        train_text_encoder: whether the text encoder is trained along, instead of being frozen.
        text_lr_scale: factor on the learning rate of the text encoder.
        p_uncond: share of training samples whose text is taken away, for classifier-free guidance.
        times: how the times of training steps are drawn.
        loss: what is minimised.
        sampler: how sound is generated.
        evaluation: metrics of generated sound in tests; null for none.
        prompts: texts to generate samples for, during training; null takes those of the newest batch.
        text_cache_mb: memory for what a frozen text encoder said about texts.
        text_cache_dir: folder for that, which runs may share; null keeps it in memory only.
        seed: seed of times, noise and dropped texts.
        optimizer: factory taking parameter groups.
        lr_scheduler: factory taking the optimizer; stepped after every optimizer step.
        sharding: sharding, activation checkpointing and compilation.

    Raises:
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        backbone: WaveformBackbone,
        text: TextRecipe | None = None,
        train_text_encoder: bool = False,
        text_lr_scale: float = 0.1,
        p_uncond: float = 0.1,
        times: Times = Times(),
        loss: WaveformLoss = WaveformLoss(),
        sampler: Sampling = Sampling(),
        evaluation: Evaluation | None = None,
        prompts: list[str] | None = None,
        text_cache_mb: float = 256.0,
        text_cache_dir: str | None = None,
        seed: int = 1234,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, sharding)
        self.save_hyperparameters()
        if not 0 <= p_uncond <= 1:
            raise ValueError(f"model.p_uncond must lie in [0, 1], got {p_uncond}")
        if not text_lr_scale > 0:
            raise ValueError(f"model.text_lr_scale must be positive, got {text_lr_scale}")
        if text_cache_mb < 0:
            raise ValueError(f"model.text_cache_mb must be at least 0, got {text_cache_mb}")
        if seed < 0:
            raise ValueError(f"model.seed must be at least 0, got {seed}")
        if train_text_encoder and text is None:
            raise ValueError("model.train_text_encoder: there is no text encoder to train; set model.text")
        if text is not None and p_uncond == 0 and sampler.guidance.scale != 1:
            rank_zero_warn(
                "model.p_uncond: it is 0, so that the model never learns what sound is like without a text, which "
                "guidance compares with; raise it, or set model.sampler.guidance.scale to 1"
            )
        self.backbone, self.text, self.train_text_encoder = backbone, text, train_text_encoder
        self.text_lr_scale, self.p_uncond, self.seed = text_lr_scale, p_uncond, seed
        self.times, self.loss, self.sampler = times, loss, sampler
        self.evaluation, self.prompts = evaluation, prompts
        self.text_cache_mb, self.text_cache_dir = text_cache_mb, text_cache_dir
        rebuilt = text is None or text.reproducible
        self.frozen = ("text_encoder", "metrics") if rebuilt else ("metrics",)
        self.net = None  # type: ignore[assignment]
        self.text_encoder: nn.Module | None = None
        self.metrics: SampleMetrics | None = None
        self._cache: TextCache | None = None
        self._drawn_times = times.sampler(seed)
        self._samples = 0  # training samples of all ranks so far
        self._rows = 0  # rows of this rank that were evaluated since the evaluation began
        self._window: list[Tensor] = []  # values that count in each batch since the last optimizer step
        self._step_shape: tuple[int, int] | None = None  # clips and their samples
        self._flops: dict[int, float] = {}  # of a clip, by its samples
        self._totals: dict[str, Tensor] = {}
        self._newest: Batch = {}
        self._is_sampling = False
        self._checked: set[str] = set()  # what was looked at once and need not be again

    # -- networks ----------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the text encoder and the network.

        Raises:
            ValueError: if the parts do not fit each other.
        """
        if self.net is not None:
            return self.shard_built()
        encoder: Any = None
        if self.text is not None and not self.train_text_encoder:
            if self.device_mesh is not None and not self.text.reproducible:
                raise ValueError(
                    "model.train_text_encoder: sharded processes would not share the random weights of a frozen "
                    f"{type(self.text).__name__}; set it to true"
                )
            # Whole on every process, since each asks for texts that it does not remember.
            encoder, self.tokenizer = self.text.build()
            self.text_encoder = encoder.requires_grad_(False).eval()
        net, tokenizer = self.build(lambda: self._build_net(encoder))
        if tokenizer is not None:
            self.tokenizer = tokenizer
        if self.text is not None:
            self.pooling = net.pooling = resolve_pooling(self.text.pooling, self.tokenizer)
        if self.evaluation is not None:
            self.metrics = self.evaluation.build(self.sample_rate_of(net.unet))
        self.place("net", net)
        self.check_ema()

    def _build_net(self, frozen: nn.Module | None) -> tuple[WaveformNet, Any]:
        """Network, and tokenizer of a text encoder in it."""
        if self.text is None or frozen is not None:
            return WaveformNet(self.backbone.build(None if frozen is None else text_width(frozen))), None
        encoder, tokenizer = self.text.build()
        return WaveformNet(self.backbone.build(text_width(encoder)), encoder), tokenizer

    def trained_networks(self) -> dict[str, nn.Module]:
        """The UNet, in the parameter groups `model` and `model_no_decay`, and a trained text encoder, as `text`."""
        networks = {"model": self.net.unet}
        return networks if self.net.text_encoder is None else networks | {"text": self.net.text_encoder}

    def group_options(self) -> dict[str, GroupOptions]:
        """The smaller learning rate of the text encoder."""
        if self.net.text_encoder is None:
            return {}
        rate = self.optimizer([nn.Parameter(torch.zeros(1))]).defaults["lr"]
        return {"text": GroupOptions(lr=rate * self.text_lr_scale)}

    # -- batches -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Keep Lightning from warning that batches are looked at here and not by the data module.

        Args:
            stage: "fit" and so on.
        """
        super().setup(stage)
        warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Check a batch while it is still on the CPU.

        Args:
            batch: see above.
            dataloader_idx: ignored.

        Returns:
            The batch.

        Raises:
            ValueError: if the batch cannot be used; the message names the key to change.
        """
        predicting = self._trainer is not None and self.trainer.predicting
        check_batch(batch, self.net.unet, self.text is not None, self.loss, needs_audio=not predicting)
        for name, check in (("rate", self._check_rate), ("scale", self._check_scale), ("text", self._check_text)):
            if name not in self._checked:
                self._checked.add(name)
                check(batch)
        return batch

    def _check_rate(self, batch: Batch) -> None:
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        rates = (getattr(owner, "sample_rate", None) for owner in (data, getattr(data, "options", None)))
        rate = next(filter(None, rates), None)
        if rate is not None and rate != self.sample_rate:
            raise ValueError(
                f"data.sample_rate: the clips have {rate} Hz, but the network was made for {self.sample_rate} Hz; set "
                "it to that, or model.backbone.sample_rate to the rate of the clips"
            )

    def _check_scale(self, batch: Batch) -> None:
        if "audio" not in batch:
            return
        strength = deviation(batch)
        if strength * self.data_scale < QUIET:
            has_option = "data_scale" in cast(Any, self.net.unet).config
            remedy = "set data.level so that it is about 1"
            if has_option and strength > 0:
                remedy = f"set it to about {1 / strength:.3g}"
            rank_zero_warn(
                f"{'model.backbone.data_scale' if has_option else 'data.level'}: the sound of the first batch has a "
                f"deviation of only {strength * self.data_scale:.2g} where the process assumes 1, so that the network "
                f"sees little but noise; {remedy}"
            )

    def _check_text(self, batch: Batch) -> None:
        reads = "embedding" in batch or self.text is not None or not hasattr(self.net.unet, "text_dim")
        if any(batch.get("text", ())) and not reads:
            rank_zero_warn("model.text: the batches hold texts, but there is no text encoder, so they are not read")

    def _scaled(self, batch: Batch) -> Tensor:
        """(B,C,T) float32, sound as it is diffused."""
        return batch["audio"].float() * self.data_scale

    def _mask(self, batch: Batch) -> Tensor | None:
        """(B,1,T) bool, the samples that count; None for all."""
        if not self.loss.mask:
            return None
        return functional.valid_mask(batch["valid_length"], batch["audio"].shape[-1])

    def _condition(self, batch: Batch) -> dict[str, Any]:
        """Arguments of `NetworkInput` for the condition of a batch."""
        if self.text is None:
            return {} if "embedding" not in batch else {"vector": batch["embedding"].float()}
        if self.text_encoder is not None:
            return {"states": self.encode(batch["text"])}
        tokens = tokenize(self.tokenizer, batch["text"], self.text.max_tokens)
        return {"tokens": {name: ids.to(self.device, non_blocking=True) for name, ids in tokens.items()}}

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, inputs: NetworkInput) -> Tensor:
        """Predict the velocity.

        Args:
            inputs: noisy sound and its condition.

        Returns:
            (B,C,L) float32.
        """
        velocity: Tensor = self.net(inputs)
        return velocity

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one batch, for the gradient of the mean over all values of the optimizer step."""
        x, mask = self._scaled(batch), self._mask(batch)
        rank, world, everyone = self.global_rank, self.trainer.world_size, self._samples_of_all(len(x))
        numbers = draws.sample_numbers(self._samples, len(x), rank, world)
        drawn = draws.draw(self.seed, draws.TRAIN, numbers)
        with full_precision(x.device):
            t = self._drawn_times(everyone)[rank::world].to(x.device, non_blocking=True)
            noise = draws.normal_noise(drawn.seeds, tuple(x.shape[1:]), x.device)
            z, target = functional.diffuse(x, noise, t), functional.velocity(x, noise, t)
        self._samples += everyone
        condition = self._condition(batch)
        if condition:  # nothing to drop gives the null vector a gradient too, which data parallelism waits for
            condition["drop"] = (drawn.uniform < self.p_uncond).to(x.device, non_blocking=True)
        predicted = self(NetworkInput(z, t, **condition))
        with full_precision(x.device):
            total, number, error = self._sums(predicted, target, z, x, t, mask)
        local = torch.stack([total.detach(), number, error.detach()]).double()
        everywhere = all_reduce_sum(self, local)
        self._window.append(everywhere[1])
        self._step_shape = (x.shape[0], x.shape[-1])
        self._keep(batch)
        loss, plain = (everywhere[::2] / everywhere[1].clamp(min=1)).float()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        if self.loss.weighting != "none" or self.loss.stft:
            self.log("train/mse", plain, batch_size=len(x))
        # Data-parallel strategies average gradients over ranks, where a sum is needed.
        return total * (world / self._window[0].clamp(min=1).float())

    def _samples_of_all(self, own: int) -> int:
        """Samples of a training batch on all ranks together, of which this one has some."""
        rank, world = self.global_rank, self.trainer.world_size
        if world == 1:
            return own
        position = getattr(self.trainer.train_dataloader, "position", None)
        if position is None:  # of a loader that does not tell, so that ranks have to ask each other
            return int(all_reduce_sum(self, torch.tensor(float(own), dtype=torch.float64)))
        everyone: int = min(position.global_batch, position.rows or position.global_batch)
        if own != len(range(rank, everyone, world)):
            raise ValueError(
                f"data.batch_size: process {rank} has {own} rows of a batch of {everyone} for {world} processes, which "
                "all take turns; a collator must neither add nor drop rows"
            )
        return everyone

    def _sums(
        self, predicted: Tensor, target: Tensor, z: Tensor, x: Tensor, t: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the loss, number of values that count, and sum of the errors without weights, each ()."""
        options = self.loss
        loss = functional.velocity_loss(predicted, target, t, options.weighting, mask, options.snr_limit)
        counts = torch.full_like(t, float(x[0].numel()))
        if mask is not None:
            counts = mask.sum((1, 2)).to(t.dtype) * x.shape[1]
        total = loss.total
        if options.stft:
            clean, _ = functional.sound_and_noise(z, predicted, t)
            if mask is not None:
                clean, x = torch.where(mask, clean, 0.0), torch.where(mask, x, 0.0)
            distances = functional.stft_distance(clean, x, options.stft_sizes)
            share = functional.alpha_sigma(t)[0].square()  # a guess under much noise counts little
            # A clip counts by its length, so that this is a mean over the values of a step like the rest.
            total = total + options.stft * (counts * share * distances).sum()
        return total, loss.number, (loss.per_clip * counts).sum()

    def on_train_start(self) -> None:
        """Begin a step."""
        self._window.clear()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """See `LitBase.rescale_gradients`."""
        self.rescale_gradients(self.net, self._window)
        self._window.clear()

    def step_stats(self) -> dict[str, float]:
        """Clips of the last training step on this rank, as `examples`, and seconds of sound, as `audio_seconds`."""
        if self._step_shape is None:
            return {}
        clips, length = self._step_shape
        return {"examples": float(clips), "audio_seconds": clips * length / self.sample_rate}

    def step_flops(self) -> float | None:
        """Operations of the last training step on this rank, without those of a text encoder."""
        if self._step_shape is None:
            return None
        clips, length = self._step_shape
        if length not in self._flops:
            self._flops[length] = forward_flops(self.net.unet, length)
        return 3 * clips * self._flops[length]  # the backward pass takes twice as many

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the place in the sequence of samples, which is the same on all ranks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["waveform"] = {"samples": self._samples, "times": self._drawn_times.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the numbers of the next sample."""
        super().on_load_checkpoint(checkpoint)
        place = checkpoint["waveform"]
        self._samples = int(place["samples"])
        self._drawn_times.load_state_dict(place["times"])

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._rows = 0
        self._totals = {}

    def _next_numbers(self, batch_size: int) -> list[int]:
        """Numbers of the rows of a batch among those of all ranks."""
        world = 1 if self._trainer is None else self.trainer.world_size
        numbers = draws.sample_numbers(self._rows * world, batch_size, self.global_rank, world)
        self._rows += batch_size
        return numbers

    def _evaluate(self, batch: Batch, use: int, numbers: list[int]) -> None:
        """Add the errors of a batch at fixed times to the totals, with averaged and with present weights."""
        x, mask = self._scaled(batch), self._mask(batch)
        seeds = draws.draw(self.seed, use, numbers).seeds
        with full_precision(x.device):
            t = draws.evaluation_times(numbers).to(x.device)
            noise = draws.normal_noise(seeds, tuple(x.shape[1:]), x.device)
            z, target = functional.diffuse(x, noise, t), functional.velocity(x, noise, t)
        inputs = NetworkInput(z, t, **self._condition(batch))
        counted = torch.ones_like(t, dtype=torch.bool) if mask is None else mask.any(-1)[:, 0]
        networks = {"": self.net} if self.ema is None else {"": self.ema, "online_": self.net}
        for prefix, network in networks.items():
            loss = functional.velocity_loss(network(inputs), target, mask=mask)
            by_time = functional.loss_by_time(loss.per_clip[counted], t[counted], _PARTS)
            sums = torch.cat([torch.stack([loss.total, loss.number]), *by_time]).double()
            self._totals[prefix] = self._totals[prefix] + sums if prefix in self._totals else sums
        self._keep(batch)

    def _log_totals(self, stage: str) -> None:
        prefixes = [""] if self.ema is None else ["", "online_"]
        for prefix in prefixes:
            zeros = torch.zeros(2 + 2 * _PARTS, device=self.device, dtype=torch.float64)
            total, number, *by_time = all_reduce_sum(self, self._totals.get(prefix, zeros)).tolist()
            self.log(f"{stage}/{prefix}loss", total / max(number, 1), prog_bar=not prefix, sync_dist=True)
            for part, (errors, clips) in enumerate(zip(by_time[:_PARTS], by_time[_PARTS:], strict=True)):
                if not prefix and clips:
                    self.log(f"{stage}/loss_t{part}", errors / clips, sync_dist=True)
        self._totals = {}

    def on_validation_epoch_start(self) -> None:
        """Begin with the numbers of the first row."""
        self._begin()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the totals."""
        self._evaluate(batch, draws.VALIDATE, self._next_numbers(len(batch["audio"])))

    def on_validation_epoch_end(self) -> None:
        """Log the errors over all values and ranks.

        `val/loss` is the squared error without weights, `val/loss_t0` to `val/loss_t3` that of the quarters of [0, 1]
        from clean sound to noise. Where an average is kept, they are those of the average, and `val/online_loss` is
        that of the present weights.
        """
        self._log_totals("val")

    def on_test_epoch_start(self) -> None:
        """Begin with the numbers of the first row."""
        self._begin()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the totals, and what is generated for its texts to the metrics."""
        numbers = self._next_numbers(len(batch["audio"]))
        self._evaluate(batch, draws.VALIDATE, numbers)
        if self.metrics is None or self.evaluation is None:
            return
        room = self.metrics.room(len(numbers))
        with self._sampling():  # on all ranks, whether or not they have room
            if room > 0:
                self._measure(first_rows(batch, room), numbers[:room])

    def _measure(self, rows: Batch, numbers: list[int]) -> None:
        """Add what is generated for some rows to the metrics."""
        assert self.metrics is not None
        assert self.evaluation is not None
        each, options = self.evaluation.samples_per_prompt, self.sampler
        seeds = [seed for number in numbers for seed in self._seeds(draws.TEST, number, each)]
        if self.evaluation.steps is not None:
            options = replace(options, steps=self.evaluation.steps)
        if self.evaluation.guidance is not None:
            options = replace(options, guidance=replace(options.guidance, scale=self.evaluation.guidance))
        length = rows["audio"].shape[-1] if options.seconds is None else None
        texts, vectors = rows.get("text"), rows.get("embedding")
        generated = self.generate(
            None if texts is None else [text for text in texts for _ in range(each)],
            length,
            seeds,
            None if vectors is None else vectors.repeat_interleave(each, 0),
            options,
        )
        with full_precision(self.device):
            self.metrics.update(
                generated.to(self.device),
                rows["audio"].float(),
                rows.get("valid_length"),
                rows.get("columns", {}),
                text=texts,
            )

    def on_test_epoch_end(self) -> None:
        """Log the errors as in validation, under `test/`, and the metrics of generated sound."""
        self._log_totals("test")
        if self.metrics is not None:
            values = self.metrics.compute()
            self.log_dict({f"test/{name}": value for name, value in values.items()}, sync_dist=True)
            self.metrics.reset()

    def on_predict_epoch_start(self) -> None:
        """Begin with the numbers of the first row."""
        self._begin()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Generate sound for every text.

        Returns:
            `audio` (B,C,L) float32 on the CPU, not clipped, padded with silence if lengths differ; `valid_length` (B,)
            int64, its samples; `sample_rate`; `text`, B texts, "" without any; `index` (B,) int64, `index` of the batch
            or else the number of the row.
        """
        size = rows_of(batch)
        numbers = self._next_numbers(size)
        lengths = self._lengths(batch, size)
        seeds = [self._seeds(draws.PREDICT, number)[0] for number in numbers]
        texts, vectors = batch.get("text"), batch.get("embedding")
        channels = int(cast(Any, self.net.unet).config.in_channels)
        audio = torch.zeros(size, channels, max(lengths), dtype=torch.float32)
        with self._sampling():
            for length in sorted(set(lengths)):  # those of one length together
                rows = [row for row in range(size) if lengths[row] == length]
                audio[rows, :, :length] = self.generate(
                    None if texts is None else [texts[row] for row in rows],
                    length,
                    [seeds[row] for row in rows],
                    None if vectors is None else vectors[rows],
                )
        index = batch["index"].cpu() if "index" in batch else torch.tensor(numbers)
        return {
            "audio": audio,
            "valid_length": torch.tensor(lengths),
            "sample_rate": self.sample_rate,
            "text": [""] * size if texts is None else list(texts),
            "index": index,
        }
