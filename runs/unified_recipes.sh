#!/usr/bin/env bash
# The published recipes of UniRL-Zero (arXiv 2510.17937) and PromptRL (arXiv 2602.01382) for grpo_unified.py, each for one
# node of 8 GPUs with 80 GB:
#
#     runs/unified_recipes.sh flux-joint                                    # more flags may follow, and win
#     BLIP3O=outputs/blip3o/model runs/unified_recipes.sh blip3o-t2i        # the folder of a pretrained model
#     GPUS=7 runs/unified_recipes.sh kontext-joint --reward http://127.0.0.1:18088/editreward format
#
# Not run here at this size: no number of ours exists, and what follows is what the two repositories run, in our conventions.
# What a command does not say is in recipe() of grpo_unified.py: 8 samples of one prompt per GPU and iteration, one update,
# texts of at most 512 tokens at temperature 1, weight 0.01 of the LM's KL, 1,200 iterations. PromptRL reports 0.06 M
# rollouts, 940 iterations of 64; UniRL-Zero no budget.
#
# The same in both conventions, and so not converted: advantages (r - mean) / (std + 1e-4) clipped to +- 5; log-probs as a
# mean over latent dims, and with them the clip of 1e-4; KL of a denoising step (mean - mean_ref)^2 / (2 std^2), std with
# sqrt(dt) inside (unlike flow_grpo's), and with it its weight; noise level a in a sqrt(sigma / (1 - sigma)); the LM's loss
# per token of a sample, then per sample, with a k3 KL. Rewards are summed.
#
# Converted, or not the same:
#   noise    UniRL-Zero trains all steps, the last one too, and so judges pictures with noise in them. Here all but the
#            last (--window-size 0). PromptRL's --num_sde n is --window-size n --window-range 0 n: the first n steps.
#   std      UniRL-Zero's has 7 instead of 8 in the denominator: our advantages are 7 % larger, its KL weighs 7 % less.
#   rates    theirs fall linearly, without warm-up, over 5 to 200 epochs of which a run sees little: here constant after
#            5 updates. Their gradients are not clipped; here at norm 1. --learning_rate of UniRL-Zero's scripts reaches its
#            t2i and i2i only; the others have rates in the code, which are those below.
#   prompts  what the two train on is not here. data/geneval_train.jsonl has 3,000 prompts in GenEval's manner, some of them
#            the benchmark's own, which --eval-prompts evaluation_metadata.jsonl leaves out. Theirs, train_metadata.jsonl
#            of flow_grpo, is read as it is with --prompts. For data/scenes.txt they have pickscore.txt. data/edits.jsonl stands
#            for UniRL-Zero's i2i_dataset.parquet, which was never released, and PromptRL's omni_edit_train_50k.parquet, of
#            the model repository wangfuyun/PrompRL on the hub.
#   words    the LM is asked to refine in our words (REFINE in models/blip3o.py), and the DM draws its answer. UniRL-Zero's
#            t2icot draws the whole conversation, chat headers included. `format` wants exactly one answer tag anywhere;
#            UniRL-Zero's wants one at the beginning.
#   LM       tokens come from the whole softmax, whose log-probs are trained; theirs from the top 50.
#   rewards  pictures are not sent through JPEG. GenEval's soft score without its bugs (see rewards/geneval.py).
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?blip3o-t2i, -jpeg, -t2icot, -i2i; flux-lm, -dm, -joint, -geneval; sd3-lm; sana-lm; kontext-lm, -cycle, -joint; klein-geneval, -joint}
shift
# BLIP3o has no published weights: `torchrun --nproc_per_node 8 pretrain.py --model blip3o --out outputs/blip3o` makes them.
blip3o=${BLIP3O:-blip3o}
case $name in
    # --- UniRL-Zero, one unified model: 1024 pixels, 10 steps, noise level 0.7, guidance 3.5, all in recipe().

    # t2i. The reward of the original is 0 for names that it does not know; here that is an error. Its pretraining, RL and
    # inference have three different prompts; ours are one.
    blip3o-t2i)
        set -- --model "$blip3o" --task t2i --train dm --reward geneval --learning-rate 1e-5 --kl-coef 4e-3 "$@"
        ;;

    # t2i with the size of a JPEG, in kB / -500, for prompts without metadata.
    blip3o-jpeg)
        set -- --model "$blip3o" --task t2i --train dm --reward jpeg --prompts data/scenes.txt --learning-rate 1e-5 \
            --kl-coef 4e-3 "$@"
        ;;

    # t2icot. BLIP3O is the folder of a cold start (pretrain.py --task t2icot --train-lm), of which UniRL-Zero has released
    # neither weights nor code. 5e-7 and 3e-6 are the code's; its docstring says 1e-6 and 1e-5. There the autoencoder is in the
    # optimizer, too, without ever having a gradient, and a ratio that is not 1 to the last bit ends the run.
    blip3o-t2icot)
        set -- --model "$blip3o" --task t2icot --train joint --reward geneval format --lm-learning-rate 5e-7 \
            --learning-rate 3e-6 --kl-coef 4e-3 "$@"
        ;;

    # i2i, cycle-consistent: 4 x directional CLIP similarity of the edit + CLIP similarity of source and way back. The
    # original draws with guidance 3.0 and replays with 3.5, so that its ratios are not 1 at the start; here 3.0 twice.
    # Guidance of 1.0 on the picture is none.
    blip3o-i2i)
        set -- --model "$blip3o" --task i2i_cycle --train dm --prompts data/edits.jsonl --reward clip_direction:4 recon_clip_sim \
            --guidance 3 --image-guidance 1 --learning-rate 1e-5 --kl-coef 3e-4 "$@"
        ;;

    # --- UniRL-Zero, Qwen2.5-VL-3B and a diffusion model: 512 pixels, guidance 3.5.

    # t2i-text: 10 ODE steps, as only the LM learns.
    flux-lm)
        set -- --lm qwen2.5-vl-3b --model flux --task t2icot --train lm --reward geneval format --num-steps 10 \
            --lm-learning-rate 1e-6 "$@"
        ;;

    # t2i-diff: the prompts as they are, 20 steps with noise level 1. Its `format` reward, 0 for every caption, is left out.
    flux-dm)
        set -- --lm qwen2.5-vl-3b --model flux --task t2i --train dm --reward geneval --noise-level 1 --window-size 0 \
            --window-range 0 0 --learning-rate 1e-5 --kl-coef 3e-4 "$@"
        ;;

    # t2i-joint. There is no script of it: the KL's weight is that of t2i-diff's.
    flux-joint)
        set -- --lm qwen2.5-vl-3b --model flux --task t2icot --train joint --reward geneval format --noise-level 1 \
            --window-size 0 --window-range 0 0 --lm-learning-rate 3e-7 --learning-rate 1e-7 --kl-coef 3e-4 "$@"
        ;;

    # t2i-text with SD3.5-medium, which there is an unauthenticated service that unpickles requests, and here a model of the
    # run. The shift is applied twice, as diffusers does it.
    sd3-lm)
        set -- --lm qwen2.5-vl-3b --model sd3.5 --task t2icot --train lm --reward geneval format --num-steps 10 \
            --guidance 3.5 --lm-learning-rate 1e-6 "$@"
        ;;

    # t2i-text with SANA 1.5, at half the size that it was made for. Its 10 steps are DPM-Solver's, of second order, ours
    # Euler's: pictures are coarser at the same cost.
    sana-lm)
        set -- --lm qwen2.5-vl-3b --model sana --task t2icot --train lm --reward geneval format --num-steps 10 \
            --guidance 3.5 --resolution 512 --lm-learning-rate 1e-6 "$@"
        ;;

    # i2i-text: the LM sees the picture and rewrites the instruction, EditReward judges by the user's own. The original
    # replays tokens without the picture, a policy that it did not sample from, and ends at its first iteration with a
    # misspelt name. It asks for 512 pixels, and its Kontext edits 1024 all the same.
    kontext-lm)
        set -- --lm qwen2.5-vl-3b --model kontext --task i2i --refine --keep-original 0 --train lm --reward editreward \
            --num-steps 10 --lm-learning-rate 1e-6 "$@"
        ;;

    # i2i-text-cyle: the way back is drawn from the reverse instruction as it is. Directional CLIP similarity and CLIP
    # similarity of the way back with equal weights.
    kontext-cycle)
        set -- --lm qwen2.5-vl-3b --model kontext --task i2i_cycle --refine --keep-original 0 --train lm \
            --reward clip_direction recon_clip_sim --num-steps 10 --lm-learning-rate 1e-6 "$@"
        ;;

    # --- PromptRL, Qwen2.5-VL-3B and a diffusion model: noise level 0.8 in the first steps, KL weight 1e-2. Its scripts leave
    # two of 8 GPUs to a reward server, its README one: `python -m rewards.serve --reward editreward --device cuda:7 --port
    # 18088` and GPUS=7, as above. Here rewards are in the run, on every GPU: 17 GB for EditReward.

    # GenEval. 20 steps of which 10 are noisy, by its README; by its scripts 6, at 1024 pixels; 512 is the paper's. No user's
    # words among the samples, as in its code; the paper keeps 2 of 8 (--keep-original 2). The paper's rates and weights are
    # 1e-6 and 0.01 (LM), 3e-7 and 4e-3 (DM). --train lm is its prompt-only mode.
    flux-geneval)
        set -- --lm qwen2.5-vl-3b --model flux --task t2icot --train joint --reward geneval format --window-size 10 \
            --window-range 0 10 --lm-learning-rate 1e-6 --learning-rate 2e-7 --kl-coef 1e-2 "$@"
        ;;

    # Edits with 6 refined instructions and 2 of the user's own words, 4 of 8 steps noisy, by its script; by its README 2.
    kontext-joint)
        set -- --lm qwen2.5-vl-3b --model kontext --task i2i --refine --keep-original 2 --train joint \
            --reward editreward format --window-size 4 --window-range 0 4 --lm-learning-rate 3e-7 --learning-rate 2e-7 \
            --kl-coef 1e-2 "$@"
        ;;

    # GenEval with FLUX.2 klein: 8 of 20 steps, guidance 4, 1024 pixels. The original samples with guidance, two passes, and
    # replays one pass without, so that its ratios mean nothing; and its text encoder sees 128 of the LM's 512 tokens.
    klein-geneval)
        set -- --lm qwen2.5-vl-3b --model klein --task t2icot --train joint --reward geneval format --window-size 8 \
            --window-range 0 8 --lm-learning-rate 1e-6 --learning-rate 2e-7 --kl-coef 1e-2 "$@"
        ;;

    # Edits with klein, by its script; by its README 6 steps, guidance 4, 512 pixels. Besides the bug above, every sample of
    # the original attends to the pictures of all 8.
    klein-joint)
        set -- --lm qwen2.5-vl-3b --model klein --task i2i --refine --keep-original 2 --train joint \
            --prompts data/edits.jsonl --reward editreward format --num-steps 8 --window-size 2 --window-range 0 2 \
            --guidance 3.5 --lm-learning-rate 3e-7 --learning-rate 2e-7 --kl-coef 1e-2 "$@"
        ;;
    *) echo "error: $name is no recipe; $0 without arguments names them" >&2 && exit 1 ;;
esac
torchrun --nproc_per_node "${GPUS:-8}" grpo_unified.py --out "outputs/unified-$name" "$@"
