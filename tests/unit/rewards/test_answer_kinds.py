"""Kinds of answers that were judged wrongly, each with right and wrong inputs of its own."""

from __future__ import annotations

import pytest

from megatron_parallel_r1.rewards.verification import extract_answer
from megatron_parallel_r1.rewards.verifier import Verifier
from megatron_parallel_r1.utils.latex import last_boxes

# kind: pairs of (reference, answer), right ones and wrong ones
KINDS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "small and close numbers": (
        [
            ("0.00032", "3.2 \\times 10^{-4}"), (r"\frac{1}{8}", "0.125"), (r"\frac{7}{9}", "0.777778"),
            (r"\sqrt{7}", "2.64575131"), (r"\frac{\sqrt{3}}{10^{9}}", r"\sqrt{3}\cdot 10^{-9}"),
            ("-0.0", "0"),
        ],
        [
            (r"\frac{1}{300000}", "0.000003"), ("0.0000021", "0.000002"),
            (r"\frac{\sqrt{3}}{10^{9}}", r"\frac{\sqrt{5}}{10^{9}}"),
            (r"\frac{1}{100!}", r"\frac{-1}{100!}"), (r"\frac{1}{100!}", r"\frac{1}{101!}"),
            ("0", r"\frac{\pi}{10^{20}}"), (r"\left(\frac13\right)^{50}", r"\left(\frac13\right)^{51}"),
            (r"9.11\times10^{-31}", r"9.12\times10^{-31}"), (r"e^{-40}", r"e^{-41}"),
            (r"10^{-30}x", r"2\cdot10^{-30}x"), (r"\sqrt{2}+10^{-30}", r"\sqrt{2}"), ("2", "-2"),
            (r"\frac{\sqrt{2}}{2}", r"-\frac{\sqrt{2}}{2}"), ("(0.000001, 1)", "(0.000002, 1)"),
        ],
    ),
    "float noise": (
        [
            ("0.3", "0.30000000000000004"), ("1.1", "1.1000000000000001"), ("2.2", "2.2000000000000002"),
            ("0.8", "0.7999999999999999"), (r"\frac{1}{3}", "0.33333333333333337"),
            ("-4.35", "-4.3500000000000005"),
        ],
        [
            ("0.3", "0.3000001"), ("1", "1.00000000001"), ("0.3", "-0.30000000000000004"),
            ("1.1", "1.10000000001"), ("5", "4.99999999999"),
        ],
    ),
    "e-notation": (
        [
            ("2.5e4", "25000"), ("0.0042", "4.2E-3"), ("7e-3", "0.007"), (r"3.2 \times 10^{5}", "3.2e5"),
            ("-1.5e-2", "-0.015"), ("4e+3", "4000"), ("1.60e-19", r"1.6 \cdot 10^{-19}"),
            ("9.8e0 m/s^2", "9.8"), ("5*10^-2", "0.05"),
        ],
        [
            ("2.5e4", "2.5e5"), ("0.0042", "4.2e-4"), ("2e3", "2000000"), ("1e-5", "-1e-5"), ("3e", "3"),
            ("2e^3", "2000"), ("1e5", "1e-5"),
        ],
    ),
    "repeating decimals": (
        [
            (r"\frac{1}{6}", "0.1666..."), ("0.(6)", r"\frac{2}{3}"), ("0.121212...", r"\frac{4}{33}"),
            ("0.1(6)", r"\frac16"), (r"0.\overline{45}", "5/11"), ("0.777\\ldots", "7/9"),
        ],
        [
            ("0.666", "0.666..."), ("0.(6)", "0.6"), (r"\frac{1}{3}", "0.3..."), ("0.(3)", "1/9"),
            ("0.12(3)", "0.123"),
        ],
    ),
    "units": (
        [
            ("250 g", "0.25 kg"), (r"90\text{ minutes}", "1.5 hours"), ("1 hour 15 minutes", "75 minutes"),
            ("36 km/h", "10 m/s"), (r"3\text{ m}^2", r"30000\text{ cm}^2"),
            ("5 feet 6 inches", "66 inches"), ("12", "12 students"), ("8 L", "8000 mL"),
            (r"7\text{ miles per hour}", "7 mph"), ("4", r"4\ \mathrm{cm}"),
            ("20 square feet", r"20\text{ ft}^2"), ("3 weeks", "21 days"),
            (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}"), ("54 gallons", "54 gallons of water"),
            ("9.8", r"9.8\,\frac{\mathrm{m}}{\mathrm{s}^2}"),
        ],
        [
            ("250 g", "250 kg"), ("12 cm", "12 inches"), ("3 hours", "3 minutes"), ("5 m/s", "5 km/h"),
            (r"4\text{ m}", r"4\text{ m}^2"), ("5 apples", "5 oranges"), ("90 minutes", "90 hours"),
            ("1 hour 15 minutes", "1.15 hours"), ("7 kg", "7 lb"),
            (r"2\sqrt{3}\text{ cm}", r"2\sqrt{3}\text{ m}"), (r"3\text{ m}^3", r"3\text{ m}^2"),
            ("25^\\circ C", "25^\\circ F"),
        ],
    ),
    "letters without a blank are variables": (
        [
            ("4 m^2", "4"), ("4 s", "4"), ("2 L", "2"), (r"4\text{m}^2", "4"), (r"4\mathrm{s}", "4"),
            ("3cm", "3"),
            ("3", "3cm"), ("20km", "20 km"), ("5hours", "5"), ("7mph", "7"), (r"20\pi cm", r"20\pi"),
            ("2ab", "2ba"), ("2h30min", "150 minutes"), ("4 m^2", "4m^2"), ("4m^2", "4 m^2"), ("4 s", "4s"),
            (r"5\text{ m/s}", "5m/s"), ("2 hours", "2h"), ("250", "250ml"),
        ],
        [
            ("4m^2", "4"), ("9s^2", "9"), ("4s", "4"), ("4", "4s"), ("2ms", "2"), ("2h/g", "2"),
            ("2L/W", "2"),
            ("5m/ab", "5"), ("2hr", "2"), (r"2\pi hr", r"2\pi"), (r"9\pi h", r"9\pi"), ("3gm", "3"),
            ("5abs", "5"), ("6cm^2/s", "6"), ("4", "4m"), (r"\frac{1}{2}mh", r"\frac12"), ("5 m/ab", "5"),
            ("4 m", "4s"), ("4m", "4 s"), ("4 apples", "4s"), (r"5\mathbf{s}", "5"), ("A = 4s", "4"),
            ("2in^2", "2"),
        ],
    ),
    "symbols of units": (
        [
            ("5 mg", "0.005 g"), ("5 mL", "5 ml"), ("5 kg", "5 kgs"), ("5 lbs", "5 lb"),
            ("3 Hours", "3 hours"),
            ("5 N", "5 newtons"), ("2 kJ", "2000 J"), ("60 Hz", "60 hertz"), ("5", "5 L"), ("5", "5 Kg"),
            ("5 km", "5 KM"), ("5", "5 Lbs"),
        ],
        [
            ("5 m", "5 ms"), ("5 mg", "5 Mg"), ("5 g", "5 gs"), ("5", "5 ms"), ("5", "5 Mg"),
            ("5 mm", "5 Mm"),
            ("5", "5 hs"), ("5", "5 MS"), ("5", "5 S"), ("5 g", "5 G"), ("5 mg", "5 Mgs"), ("5", "5 n"),
        ],
    ),
    "words that change a number": (
        [
            ("3000000", "3 million"), ("36", "3 dozen"), (r"\frac{2}{3}", "2 thirds"), ("500", "5 hundred"),
            ("1500000000", "1.5 billion"), ("4", "4 books"), ("7", "7 people"), ("1", "1 way"),
            ("24", "2 dozen eggs"), ("2000000", r"2\text{ million dollars}"),
        ],
        [
            ("3", "3 millions"), ("5", "5 hundred"), ("7", "7 tenths"), ("4", "4 halves"),
            ("6", "6 tripled"), ("5", "5 cubed"), ("5", "5 less"), ("5", "5 more than x"), ("3", "3 k"),
            ("8", "8 minus 1"), ("5", "5 negative"), ("5", "5 pairs"), ("7", "7 lakh"),
            ("2", "2 billionths"), ("9", "9 halved"), ("5", "5 below zero"), ("5", "5 percent off"),
            ("4", "4 factorials"), ("6", "6 tens"), ("5", "5 bil"), ("3", "3 times 2"), ("5", "5 is wrong"),
            ("10", "10 choose 2"), ("2", "2 point five"), ("5", "5 and a half"), ("5", "negative 5"),
            ("5", "twice 5"), ("5", "5 sevens"), ("5", "5 twenties"), ("4", "4 sixes"), ("10", "10 nines"),
            ("5", "5 myriads"), ("5", "5 apples of six"), ("5", "5 out of eleven"), ("5", "5 zillions"),
            ("5", "5 twos"), ("3", "3 fifteens"), ("5", "5 twenty-fives"),
            ("5", "5 mils"), ("5", "5 percents"), ("5", "5 lots of six"),
        ],
    ),
    "times of day": (
        [
            ("7:30 pm", "7:30 p.m."), ("8 am", "8:00 a.m."), ("10:15", "10:15 am"),
            (r"6\text{ p.m.}", "6 PM"), ("12:05 AM", "12:05 am"),
        ],
        [
            ("7:30 pm", "7:30 am"), ("8 am", "8 pm"), ("10:15 pm", "10:51 pm"), ("11 p.m.", "11 a.m."),
            ("6:00 pm", "7:00 pm"),
        ],
    ),
    "bases": (
        [
            ("1010_2", "10"), ("25", "31_8"), ("321_4", "321"), ("1F_{16}", "31"), ("1101_{2}", "1101_2"),
            ("1101_2", "1101 base 2"), ("11_2", "3_{10}"),
        ],
        [
            ("1010", "1010_2"), ("321_4", "321_5"), ("31_8", "31_9"), ("100_2", "100_3"), ("12_3", "12_4"),
            ("1010_2", "11"),
        ],
    ),
    "names": (
        [
            ("7", "x = 7"), ("a=1,b=2", "b=2,a=1"), ("(3,4)", "y=4, x=3"), ("(x,y)=(3,4)", "x=3, y=4"),
            ("7", "7 = x"), ("x^2+1", "f(x)=x^2+1"), ("12", "=12"), ("x=3", "x = 3 cm"), ("12", "AB = 12"),
            ("z=2+3i", "3i+2"),
        ],
        [
            ("a=1,b=2", "a=2,b=1"), ("(3,4)", "y=3, x=4"), ("(3,4)", "x=4, y=3"), ("x=7", "y=7"),
            ("3", "n=3m"), ("7", "x=7, y=8"), ("5", "6=5"), ("x=1", "x=1, x=2"), ("a=1,b=2", "a=1,c=2"),
        ],
    ),
    "ordered and unordered": (
        [
            ("1, 2, 3", "3, 1, 2"), (r"\{4, 5\}", "5, 4"), ("(7, 8)", "(7, 8)"), (r"\pm 5", "5, -5"),
            ("2 and 3", "3, 2"), (r"\{1,1,4\}", r"\{4,1\}"), ("(0.5, 1)", r"\left(\frac12, 1\right)"),
            (r"1 \pm \sqrt{3}", r"1-\sqrt{3}, 1+\sqrt{3}"), ("(1,2), (3,4)", "(3,4), (1,2)"),
            (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{bmatrix}1\\ \frac{4}{2}\end{bmatrix}"),
            ("x=1 or x=2", "x = 2, 1"),
        ],
        [
            (r"\{7, 8\}", "(7, 8)"), ("(7, 8)", r"\{7, 8\}"), ("(7, 8)", "(8, 7)"), ("(7, 8)", "[7, 8]"),
            ("1, 2", "1, 2, 3"), ("1, 2, 3", "1, 2"), ("(1,2), (3,4)", "(2,1), (4,3)"),
            ("2, 2, 3", "2, 3, 3"), (r"\{1, 2\}", r"\{1, 3\}"), ("123", "1, 2, 3"), ("12, 345", "12,345"),
            (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
            ("(7, 8)", "8, 7"),
        ],
    ),
    "hedges": (
        [
            ("5, 6", "5 or 6"), ("0.5", r"\frac12 or 0.5"), ("42", "approximately 42"), ("42", r"\approx 42"),
            ("3, -3", "either 3 or -3"), ("7", "about 7"),
        ],
        [
            ("5", "5 or 6"), ("6", "5 or 6"), ("5", "either 5 or 6"), ("5", "5, possibly 6"),
            ("5", "maybe 5"), ("5", "not 5"), ("5", "5 or -5"), ("5", "5, 6, or 7"),
            ("5", r"5 \text{ or } 6"), ("5", "5 or so"), ("5", "at most 5"), ("5", "nearly 5"),
            ("B", "A or B"), ("B", "B, C"), ("B", "(A) or (B)"), ("5", "5?"),
            (r"\frac12", r"\frac12 \text{ or } \frac13"), ("5", "5/6 or 5"), ("B", "not B"),
            ("5", "{5, 6}"), ("5", "5 or 5 or 6"), ("5", "probably 5"), ("5", "it might be 5"),
        ],
    ),
    "options": (
        [
            ("C", r"\text{(C)}"), ("D", "(D) 17"), ("A", "A. 5"), ("C", "C) all of the above"),
            ("B", "option B"), ("E", r"\textbf{(E)}\ 7"), ("A", "Choice A"),
            ("D", "The correct answer is D"), ("B", "The answer is (B)"), (r"\text{(B) } 12", "B"),
            ("C", "C: x+1"), ("b", "(B)"), ("C", "(C) 2A"), (r"\text{(B) } AC", "(B) AC"), ("A", "A. Dad"),
        ],
        [
            ("C", "(D) 17"), ("A", "B. 5"), ("A", "A) 5, B) 6"), ("C", "C or D"), ("B", "AB"),
            ("A", "A) 5 or C) 7"), (r"\text{(B) } 12", "(B) 13"), ("D", "The answer is not D"),
            ("B", "option A"), ("A", "ABC"), ("12", "C"),
            ("B", "B: C, D"), ("B", "B. C/D"), ("A", "A: BCD"), ("A", "(A) B C D"), ("A", "A) B / C"),
            ("A", "A: (B), (C)"), ("A", "A) b, c"), ("A", "A: B & C"),
            ("A", "A: maybe C"), ("A", "A. Or C"), ("A", "A: ?"), ("A", "A: also 5"),
        ],
    ),
    "intervals and inequalities": (
        [
            ("3<x<7", "(3,7)"), ("[0,1)", r"0 \le x < 1"), (r"x \in [2,3]", r"3 \ge x \ge 2"),
            (r"(-\infty,4]", r"x \leq 4"), ("x>5", "5<x"),
            (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)"), (r"\mathbb{R}", "all real numbers"),
            (r"(-\infty,2)\cup(2,\infty)", r"x \neq 2"), ("0<x<1/2", "(0, 0.5)"),
            (r"\{x \mid x > 3\}", r"(3,\infty)"), (r"(0,1]\cup(1,2]", "(0,2]"), ("1 <= t < 2", r"[1,2)"),
        ],
        [
            ("3<x<7", r"3 \le x < 7"), ("[0,1)", "0<x<1"), (r"x \in [2,3]", "2<x<3"), ("x>5", "x<5"),
            ("x>5", r"x \ge 5"), ("3<x<7", "(3,8)"), (r"x<1 \text{ or } x>2", "1<x<2"), ("x>5", "y>5"),
            ("x>5", "5"), (r"(-\infty,2)\cup(2,\infty)", r"\mathbb{R}"), ("x>5", "-x>5"),
            ("(3,7)", "[3,7]"),
        ],
    ),
    "money": (
        [
            ("7", r"\$7"), (r"\$12.50", "12.5"), ("€20", "20"), ("30", "30 euros"), (r"\$3", "3 dollars"),
            ("£8", "8 pounds"), ("$5", "500 cents"), ("1500", "USD 1,500"),
            (r"\$2.5 \text{ million}", "2500000"), ("250", "Rs 250"),
        ],
        [
            (r"\$7", "€7"), ("£8", r"\$8"), ("$5", "5 cents"), (r"\$12.50", "1250"), ("¥500", "$500"),
            ("7", r"-\$7"), (r"\$2 \text{ million}", "2"),
        ],
    ),
    "Unicode": (
        [
            ("34", "３４"), (r"\frac{3}{4}", "¾"), ("x^3", "x³"), (r"2\frac12", "2½"), ("60", "६०"),
            (r"2\sqrt{3}", "2√3"), (r"\alpha+1", "α + 1"), ("-7", "‐7"), ("x_1+x_2", "x₁ + x₂"),
            (r"10^{-3}", "10⁻³"), (r"\frac{\pi}{3}", "π⁄3"), ("12", "\u200b12"), ("5", "𝟓"),
            ("1000", "1\u202f000"),
        ],
        [
            ("34", "３５"), (r"\frac{3}{4}", "½"), ("x^3", "x²"), ("7", "−7"), ("10^{-3}", "10³"),
            ("x_1", "x₂"),
        ],
    ),
    "words for sets": (
        [
            (r"\emptyset", "no solution"), ("none", "No solutions"),
            (r"\text{no solution}", r"\varnothing"), (r"\mathbb{R}", r"(-\infty,\infty)"), (r"\{\}", "∅"),
        ],
        [
            (r"\emptyset", "0"), ("none", "all real numbers"), (r"\mathbb{R}", "(0,\\infty)"),
            ("0", "none"), (r"\text{no solution}", "one solution"),
        ],
    ),
    "functions and constants": (
        [
            (r"\sin(30^\circ)", r"\frac12"), ("i", r"\sqrt{-1}"), (r"\ln 5", r"\log_{e} 5"),
            (r"5\sqrt{3}", "5*3^{0.5}"), ("e^{2i\\pi}", "1"), (r"\tan 45^\circ", "1"), ("2^{3^{2}}", "512"),
            (r"\log_3 81", "4"), (r"2^{2^{10}}", "2^{1024}"), (r"\sin(2x)", r"2\sin x\cos x"),
            (r"\hat{i}-3\hat{j}", r"-3\vec{j}+\vec{i}"),
            (r"3m\pi, m \in \mathbb{Z}", r"3k\pi, k \in \mathbb{Z}"), ("4!", "24"), (r"|x|", r"\sqrt{x^2}"),
        ],
        [
            (r"\sin(30^\circ)", r"\sin(30)"), ("i", "-i"), (r"\ln 5", r"\log_{10} 5"),
            (r"\sin x", r"\cos x"), ("x", r"\sqrt{x^2}"), ("2^{3^{2}}", "64"),
            (r"2\hat{i}+\hat{j}", r"\hat{i}+2\hat{j}"),
            (r"3m\pi, m \in \mathbb{Z}", r"2k\pi, k \in \mathbb{Z}"), ("4!", "4"), (r"e^{i\pi}", "1"),
        ],
    ),
    "equations": (
        [
            ("y=3x-2", "3x-y-2=0"), ("x^2+y^2=9", "2x^2+2y^2=18"), ("2x+4y=6", "x+2y=3"), ("12", "3*4=12"),
            ("x^2=y", "y=x^2"),
        ],
        [
            ("y=3x-2", "y=3x+2"), ("x^2+y^2=9", "x^2+y^2=3"), ("x=x+1", "0=1"), ("12", "3*5=12"),
            ("2x+4y=6", "x+2y=6"), ("y=3x-2", "x=3y-2"),
        ],
    ),
    "percent and ratio": (
        [
            ("25\\%", "0.25"), ("25%", "25"), ("1/4", "25 percent"), ("3:4", "6:8"), ("0.125", "12.5%"),
        ],
        [
            ("25\\%", "0.0025"), ("25", "0.25\\%"), ("3:4", "4:3"), ("200", "2%"), ("1/4", "4%"),
        ],
    ),
    "mixed numbers": (
        [
            (r"3\frac{1}{4}", "13/4"), ("3 1/4", "3.25"), (r"-1\frac{2}{3}", r"-\frac{5}{3}"),
            ("2 3/5", r"2\frac35"), ("3¼", "3.25"),
        ],
        [
            (r"3\frac{1}{4}", "3/4"), ("3 1/4", "31/4"), (r"-1\frac{2}{3}", r"-\frac{1}{3}"),
            ("2 3/5", "2*3/5"), (r"3\frac{1}{4}", r"-3\frac{1}{4}"),
        ],
    ),
}  # fmt: skip

RIGHT = [(kind, *pair) for kind, (right, _) in KINDS.items() for pair in right]
WRONG = [(kind, *pair) for kind, (_, wrong) in KINDS.items() for pair in wrong]


@pytest.mark.parametrize(("kind", "reference", "answer"), RIGHT)
def test_the_same_answer(kind: str, reference: str, answer: str, verifier: Verifier) -> None:
    assert verifier.check(answer, reference).correct


@pytest.mark.parametrize(("kind", "reference", "answer"), WRONG)
def test_another_answer(kind: str, reference: str, answer: str, verifier: Verifier) -> None:
    assert not verifier.check(answer, reference).correct


TEXTS = [
    ("7", "So it is 7.\nAnswer: 7", True),
    ("7", "Therefore 3+4 gives it.\n#### 7", True),
    ("1/2", r"Final Answer: The final answer is $\frac12$. I hope it is correct.", True),
    ("7", "Hence the answer is 7.", True),
    ("7", r"\boxed7", True),
    ("7", "Final Answer:\n```\n7\n```", True),
    ("7", "Final Answer: `7`", True),
    ("7", "Final Answer: **7**", True),
    ("7", "**Answer:** 7", True),
    ("7", "Final Answer: Thus, 7", True),
    ("7", "Final Answer: So the answer is 7 apples.", True),
    ("C", "Final Answer: The correct option is (C).", True),
    ("a=1,b=2", r"We get $a=\boxed{1}$ and $b=\boxed{2}$.", True),
    ("3, 4", r"They are \boxed{3} and \boxed{4}.", True),
    ("7", "It is \\boxed{7}, that is\n\n\\boxed{7}", True),
    ("7", r"First \boxed{5} fails, so it must be \boxed{7}.", True),
    ("7", r"\boxed{5} or \boxed{7}", False),
    ("5", r"\boxed{5} or \boxed{7}", False),
    ("7", r"either \boxed{5}, or maybe $\boxed{7}$", False),
    ("7", r"Final Answer: \boxed{7} or 8", False),
    ("7", r"Final Answer: 8 or \boxed{7}", False),
    ("7", r"\boxed{5}, \boxed{6}, \boxed{7}", False),
    ("7", "\\boxed{5}\n\n\\boxed{7}", False),
    ("5, 7", "\\boxed{5}\n\n\\boxed{7}", True),
    ("7", r"\boxed{7 \text{ or } 8}", False),
    ("7", r"\sqrt{2} or \boxed{7}", False),
    ("7", r"\frac12 or \boxed{7}", False),
    ("7", r"$x=4$ or $\boxed{7}$", False),
    ("7", r"\(x = 4\), or \(x = \boxed{7}\)", False),
    ("7", r"(4) or \boxed{7}", False),
    ("7", r"either 4, or \boxed{7}", False),
    ("7", r"Either four apples or \boxed{7}", False),
    ("7", r"4 or else \boxed{7}", False),
    ("7", r"4, maybe \boxed{7}", False),
    ("7", "4 or\n\\[\\boxed{7}\\]", False),
    ("7", r"\(\boxed{7}\) or 6", False),
    ("7", r"\[\boxed{7}\] or 6", False),
    ("7", r"\boxed{7} (or 6)", False),
    ("7", r"\boxed{7}; or 6", False),
    ("7", "\\boxed{7}\nor 6", False),
    ("7", r"\boxed{7}. Or 6", False),
    ("7", r"\boxed{7}. Perhaps $6$.", False),
    ("7", r"**\boxed{7}** or 6", False),
    ("7", r"\boxed{7} \quad\text{or}\quad 6", False),
    ("7", r"4 apples or \boxed{7}", False),
    ("7", r"$4$ cm or it is $\boxed{7}$", False),
    ("7", "\\[x=4\\]\nor\n\\[\\boxed{7}\\]", False),
    ("7", r"\$4 or \$\boxed{7}", False),
    ("7", r"\boxed{7} apples or 6", False),
    ("7", r"\boxed{7} - or 6", False),
    ("7", r"\boxed{7}? Perhaps it is 6", False),
    ("7", r"\boxed{7} \lor 6", False),
    ("7", r"x - 7 = 0, or x = \boxed{7}", True),
    ("7", r"$7\cdot1=7$, or $\boxed{7}$.", True),
    ("7", r"\boxed{7} is odd or even", True),
    ("0.5", r"\boxed{\frac12} (or $0.5$)", True),
    ("7", r"We can add, or we get \boxed{7}.", True),
    ("7", r"Dividing, $2x = 14$, or $x = \boxed{7}$.", True),
    ("7", r"This is the number of games, or $\boxed{7}$.", True),
    ("7", r"That makes $\frac{14}{2}$, or $\boxed{7}$.", True),
    ("7", r"\boxed{7}. Or we could count them.", True),
    ("7", "\\boxed{7}\n\nOr a way with fewer steps", True),
    ("7", r"a factor \boxed{7}", True),
    ("7", "Final Answer: 7 or 8", False),
    ("7", "Final Answer: not 7", False),
    ("7", "The answer is not 7.", False),
    ("7", "#### 7 or 8", False),
    ("7", "Answer: 7\nAnswer: 8", False),
    ("a=1,b=2", r"$a=\boxed{2}$ and $b=\boxed{1}$", False),
]


@pytest.mark.parametrize(("reference", "text", "correct"), TEXTS)
def test_texts(reference: str, text: str, correct: bool, verifier: Verifier) -> None:
    assert verifier.check(extract_answer(text), reference).correct is correct


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        (r"\boxed{12} and \boxed{18}", True),
        (r"$k=\boxed{18}$ and $k=\boxed{12}$", True),
        (r"\boxed{12, 18}", True),
        (r"\boxed{18}", False),
        (r"\boxed{12} and \boxed{12}", False),
    ],
)
def test_a_reference_of_several_boxes_needs_all(text: str, correct: bool, verifier: Verifier) -> None:
    reference = last_boxes(r"so $k = \boxed{12}$ and $k = \boxed{18}$.", alternatives=False)
    assert reference and verifier.check(extract_answer(text), reference).correct is correct
