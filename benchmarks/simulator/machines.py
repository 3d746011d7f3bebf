"""Step times of real machines that the simulations run by."""

from __future__ import annotations

from contract.step_time import StepTime

QWEN3_8B_H100 = StepTime(7.2e-3, 0.0215e-3, 0.012e-3, 0.046e-6)
"""Qwen3-8B in bf16 on one H100 under vLLM: fitted to decode measurements at 1 to 256 streams, mean error
about 2 % up to 8 streams."""

LLAMA_70B_8_H100 = StepTime(8.82e-3, 0.0298e-3, 0.063e-3, 0.0128e-6)
"""Llama-70B in fp8 on eight H100 under vLLM; mean error 2.5 %."""

QWEN35_397B_8_H200 = StepTime(7.9e-3, 0.032e-3, 0.0, 0.0, experts_s=20.5e-3, active_share=10 / 512)
"""Qwen3.5-397B-A17B in fp8, a mixture of experts, on eight H200 under SGLang; mean error 5.6 %."""

CROWDED = StepTime(2e-3, 0.05e-3, 1.5e-3, 1e-6)
"""Made up: so slow for each sequence that a handful of them endangers any pace."""

LLAMA2_7B_A10G = StepTime(34.6e-3, 0.2136e-3, 0.13e-3, 0.45e-6)
"""Llama-2-7B in fp16 on one A10G under S-LoRA. Prefill as the VTC artifact's own profile has it
(fair_bench/cost_profile.json, 256 tokens); the others fitted to the records of its real trace."""
