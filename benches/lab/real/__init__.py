"""A real model, and a small pair made from it: does a pair that knows a form move a model that knows the facts?"""
