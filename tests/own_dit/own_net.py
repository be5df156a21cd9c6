"""A DiT that diffusers does not have: a plain `nn.Module`, what makes it loadable, and a pipeline that stands in."""

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import nn

SIDE = 4


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, dim=-1)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), SelfAttention(width)
        self.shift = nn.Linear(width, 3 * width)
        wide = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens, time):
        shift, scale, gate = self.shift(time).unsqueeze(1).chunk(3, dim=-1)
        tokens = tokens + gate * self.attention(self.norm(tokens) * (1 + scale) + shift)
        return tokens + self.mlp(tokens)


class Net(nn.Module):
    """Predicts the velocity of pixels [B, N, 3] from words [B, M, width] and noise levels [B]."""

    def __init__(self, width, depth):
        super().__init__()
        self.enter, self.time, self.leave = nn.Linear(3, width), nn.Linear(1, width), nn.Linear(width, 3)
        self.places = nn.Parameter(torch.randn(SIDE * SIDE, width))
        self.trunk = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, pixels, words, level, return_dict=False):  # noqa: ARG002 - as pipelines call a transformer
        tokens, time = torch.cat([words, self.enter(pixels) + self.places], dim=1), self.time(level[:, None])
        for block in self.trunk:
            tokens = block(tokens, time)
        return (self.leave(tokens[:, words.shape[1] :]),)


class OwnDit(ModelMixin, Net, ConfigMixin):
    """The same with a config and files: all that a plain module needs."""

    @register_to_config
    def __init__(self, width: int = 16, depth: int = 4):
        Net.__init__(self, width, depth)


class OwnPipeline(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, generator, num_inference_steps=4, output_type="pil"):
        width = self.transformer.config.width
        seeds = [torch.Generator().manual_seed(sum(text.encode())) for text in prompt]
        words = torch.cat([torch.randn(1, 3, width, generator=seed) for seed in seeds])
        pixels = torch.cat([torch.randn(1, SIDE * SIDE, 3, generator=own) for own in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            velocity = self.transformer(pixels, words, (time / 1000).expand(len(pixels)))[0]
            pixels = self.scheduler.step(velocity, time, pixels)[0]
        if output_type == "latent":
            return (pixels,)
        levels = ((pixels.view(-1, SIDE, SIDE, 3).clamp(-1, 1) + 1) * 127.5).byte().numpy()
        return ([Image.fromarray(image) for image in levels],)
