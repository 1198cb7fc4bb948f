"""GenEval: do images show the objects, numbers, colours and positions that their prompts ask for?"""
