"""Class-conditional DDPM: a pixel-space UNet2DModel whose prompts are class names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from safemax_sd.core.errors import OptionError
from safemax_sd.core.provenance import write_json_atomic
from safemax_sd.core.quiet import quiet
from safemax_sd.diffusion.process import check_variance_preserving, from_scheduler
from safemax_sd.diffusion.schedulers import as_scheduler, settings_of
from safemax_sd.families.base import LoadOptions, LoraTargets, ModelFamily
from safemax_sd.families.conditioning import Conditioning
from safemax_sd.families.folders import LOAD_ERRORS, cannot_be_loaded, load_part, own_side
from safemax_sd.families.single_file import CONFIG_OPTION, is_single_file
from safemax_sd.families.unet import ATTENTION, CONVOLUTIONS, memory_format

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

LABELS = "class_labels"
"""Name in `Conditioning` of the class numbers, int64 [B]."""
CLASS_NAMES = "class_names"
"""Entry of `model_index.json` with the classes in the order of their embeddings."""
PATCH_SIZE = "patch_size"
"""Entry of `model_index.json` with the side of the squares of pixels that are folded into channels; 1 if missing."""


class ClassConditionalDDPM(ModelFamily):
    """The family of `DDPMPipeline` folders whose UNet embeds a class.

    The last embedding is the empty prompt's; this null class makes classifier-free guidance possible (arXiv
    2207.12598). Samples may be pictures whose squares of `patch_size` pixels are folded into channels: this only
    reorders numbers, so the noise process is that of pixels, while the network works on fewer places. `save_base`
    writes such a folder.
    """

    name: ClassVar[str] = "ddpm"
    pipeline_classes: ClassVar[frozenset[str]] = frozenset({"DDPMPipeline"})
    no_kohya_format: ClassVar[str | None] = "A1111, Forge and ComfyUI know no ddpm models"

    def __init__(
        self, unet: Any, scheduler: Any, class_names: Sequence[str], device: torch.device, patch_size: int = 1
    ) -> None:
        embeddings = unet.config.num_class_embeds
        if embeddings != len(class_names) + 1:
            text = (
                f"must embed its {len(class_names)} classes and the empty prompt; its num_class_embeds is {embeddings}"
            )
            raise OptionError("--pretrained_model_name_or_path", "unet", text)
        channels = unet.config.in_channels
        if not isinstance(patch_size, int) or patch_size < 1 or channels % patch_size**2:
            text = f"has the patch_size {patch_size}, whose square must divide the unet's in_channels, {channels}"
            raise OptionError("--pretrained_model_name_or_path", "model_index.json", text)
        self.patch_size = patch_size
        self.unet = unet.requires_grad_(False).eval().to(device)
        self.device = device
        check_variance_preserving(scheduler)
        self.scheduler_settings = settings_of(scheduler)
        self.class_names = tuple(class_names)
        self.denoiser: nn.Module = self.unet.to(memory_format=memory_format(device))
        self.process = from_scheduler(self.sampler())
        self.empty = self.encode_prompts([""])

    @classmethod
    def load(cls, options: LoadOptions) -> ClassConditionalDDPM:
        from diffusers import DiffusionPipeline

        if is_single_file(options.name_or_path):
            raise OptionError(CONFIG_OPTION, options.single_file_config, "is a DDPM's, which needs its own folder")
        if options.quantize is not None:
            raise OptionError("--quantize", options.quantize, f"is for latent models, not {cls.name}: leave it out")
        where = {"revision": options.revision, "cache_dir": options.cache_dir}
        try:
            with quiet():
                config = DiffusionPipeline.load_config(options.name_or_path, **where)
        except LOAD_ERRORS as error:
            raise cannot_be_loaded(options.name_or_path, error) from error
        scheduler, unet = (load_part(options, name, config.get(name)) for name in ("scheduler", "unet"))
        if options.prediction_type is not None:
            scheduler.register_to_config(prediction_type=options.prediction_type)
        numbered = [str(number) for number in range((unet.config.num_class_embeds or 1) - 1)]
        names, patch_size = config.get(CLASS_NAMES, numbered), config.get(PATCH_SIZE, 1)
        return cls(unet, scheduler, names, options.device, patch_size)

    def save_base(self, directory: Path) -> None:
        """Write the model as a `DDPMPipeline` folder that `load` reads."""
        from diffusers import DDPMScheduler

        self.unet.save_pretrained(directory / "unet")
        as_scheduler(DDPMScheduler, self.scheduler_settings).save_pretrained(directory / "scheduler")
        index = {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
            CLASS_NAMES: list(self.class_names),
            PATCH_SIZE: self.patch_size,
        }
        write_json_atomic(directory / "model_index.json", index)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the prompts' class numbers, int64 [B].

        Raises:
            OptionError: A prompt is neither empty nor the name of a class.
        """
        numbers = {name: number for number, name in enumerate((*self.class_names, ""))}
        for prompt in prompts:
            if prompt not in numbers:
                raise OptionError("prompt", prompt, f"is no class of this model: {', '.join(self.class_names)}")
        return Conditioning({LABELS: torch.tensor([numbers[prompt] for prompt in prompts], device=self.device)})

    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        side, rest = divmod(self.picture_size(resolution), self.patch_size)
        if rest:
            raise OptionError(
                "--resolution", resolution, f"must be a multiple of {self.patch_size}, the model's patches"
            )
        return (self.unet.config.in_channels, side, side)

    def picture_size(self, resolution: int | None) -> int:
        return resolution or self.patch_size * own_side(self.unet.config)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None) -> Tensor:
        network = self.denoiser if denoiser is None else denoiser
        inputs = x_t.to(dtype=self.unet.dtype, memory_format=memory_format(self.device))
        output: Tensor = network(inputs, t, conditioning.tensors[LABELS], return_dict=False)[0]
        return output.float()

    def sampler(self) -> DDIMScheduler:
        from diffusers import DDIMScheduler

        # Nothing is clipped while sampling, as in the published study: a forgotten class's output is not a picture.
        return as_scheduler(DDIMScheduler, {**self.scheduler_settings, "clip_sample": False})

    def decode(self, latents: Tensor) -> Tensor:
        return (F.pixel_shuffle(latents.float(), self.patch_size) / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        if self.unet.config.in_channels == self.patch_size**2:
            pictures = pictures.mean(1, keepdim=True)
        return F.pixel_unshuffle(2 * pictures.float() - 1, self.patch_size)

    def free_encoders(self, *, decoder: bool) -> None:
        """Do nothing: this family has neither a text encoder nor an autoencoder."""

    def lora_target_modules(self, targets: LoraTargets) -> list[str]:
        if targets == "cross_attention":
            raise OptionError("--lora_targets", targets, "a class-conditional UNet has none: use all or attention")
        return ATTENTION if targets == "attention" else [*ATTENTION, *CONVOLUTIONS]

    def save_adapter(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        # DDPMPipeline loads no LoRA; names and metadata are those that diffusers gives other pipelines' files.
        named = {f"unet.{name}": tensor for name, tensor in state.items()}
        save_file(named, directory / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})

    @classmethod
    def usage(
        cls, base: str, folder: str, prompt: str, *, options: LoadOptions, full: bool, resolution: int | None
    ) -> list[str]:
        return [  # DDPMPipeline supports neither classes nor LoRA
            "import torch",
            "from safemax_sd.results.loading import load_result",
            "from safemax_sd.results.samples import to_pil",
            f"family = load_result({folder!r})",
            f"prompt, noise = family.encode_prompts([{prompt!r}]), torch.randn(1, *family.latent_shape({resolution}))",
            "latents = family.sample(prompt, noise, guidance_scale=3.0, num_inference_steps=50)",
            'to_pil(family.decode(latents))[0].save("erased.png")',
        ]

    def enable_memory_savings(self, *, gradient_checkpointing: bool, xformers: bool) -> list[str]:
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        return ["xformers attention is not used by this model family"] if xformers else []
