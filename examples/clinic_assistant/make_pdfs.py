"""Write the eight leaflets that are PDF files; they are in the repository, so nobody needs this to run the example.

    uv run --with fpdf2==2.8.9 make_pdfs.py

A word changed in a text here counts only once the files are written anew.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

LEAFLETS = Path(__file__).parent / "leaflets"

TEXTS = {
    "mammography": """Breast X-Ray (Mammography)

For a mammogram each breast is pressed between two plates for a few seconds. The whole appointment takes a quarter
of an hour. The best time is the week after your period. Do not use deodorant or powder on the day, because both can
leave white spots on the picture.

Two doctors look at every mammogram independently of each other. Women between 50 and 74 get an invitation every two
years. Pictures from another hospital should be sent to us ten days ahead. One woman in thirty is called back for a
second look, mostly without anything serious.

Implants do not rule the examination out if you mention them. The changing cubicle has a gown for you. The
mammography room is marked by a pink door on level minus one. Radiographer Bettina Osei takes the pictures.""",
    "stress_ecg": """The Exercise ECG

During an exercise ECG you pedal on a bicycle while your heart is recorded. The load rises by 25 watts every two
minutes. Ten electrodes are stuck to the chest, so thick hair may have to be shaved. Blood pressure is taken again
and again meanwhile.

Eat a light meal two hours earlier, and leave out coffee altogether. Sports shoes and shorts are the right outfit.
Showers can be used free of charge afterwards. Beta blockers are to be left out only after a call to the heart
clinic.

Stop pedalling at once if your chest hurts. A doctor stays in the room from start to end. People with a fresh heart
attack must not take the test. The heart clinic is on the mezzanine and can be called on extension 3860. The
cardiologist Dr. Hamish Varga signs the report by the evening.""",
    "emergency_department": """In the Emergency Department

The emergency department treats the sickest people first and not those who came first. A nurse judges every newcomer
within eight minutes. A red wristband stands for danger to life. Green wristbands mean that several hours of waiting
are possible.

Please do not eat before a doctor has seen you. Tell the nurse immediately if your pain gets worse. Only one
companion can come into the treatment area. A screen shows how many people wait at the moment.

Minor cuts are looked after in the walk-in practice next door until nine in the evening. The practice sees children
with fever as well. Poisonings are discussed with the poison line 145. A tetanus shot is given with every dirty
wound if the last one was long ago. Consultant Dr. Rosalind Mbeki runs the emergency department.""",
    "admission_day": """The Day You Are Admitted

Report to admissions at the round desk beneath the clock. You find your admission time in the letter from the ward.
Two weeks before, you receive a form that asks about your health. Pack a dressing gown, firm slippers and things for
washing.

Leave large sums of money and valuable rings at home. The bedside safe opens with four digits of your own choice.
All the medicines you take belong in their original boxes. Your wristband has to be worn until you go home.

A porter takes you and your suitcase up to the ward. Beds are usually ready from eleven. Hearing aids should be
marked with your name. People with a walking aid are met at the entrance by Mr. Caspian Reyes. Your family doctor is
told about the admission by fax.""",
    "discharge": """Going Home After Your Stay

On the day of discharge, the room has to be free by ten. The final letter for your doctor is handed to you in a
white envelope. The nurse explains each drug on your new list. Sick notes are signed by the ward physician during
the last round.

Those who live alone can have warm meals delivered by the town's kitchen. The social service arranges rehabilitation
and care at home. A hospital bed for the home is rented from the medical supply shop. Stairs are practised with you
if your flat has no lift.

A taxi is covered by the insurer when the doctor ticks the transport form. A nurse telephones you two days later and
asks how you are. Return borrowed crutches at the porter's window. Social worker Jolanda Efron sits in room 102.""",
    "diabetes_course": """Living With Diabetes: Our Course

The course for people with diabetes runs over five evenings. It begins at six in the seminar room above the library.
Not more than twelve persons take part. Partners can sit in without paying.

You learn to count carbohydrates with real food. Bring your own meter and your record book to each evening. The
third evening is all about the care of the feet. Cooking together closes the course on the last evening.

A low blood sugar is treated with four lumps of sugar. The course is paid by all insurers if your doctor signs the
order. Insulin pumps have a lesson of their own in spring. Shoes are examined by an orthopaedic shoemaker. Diabetes
adviser Katrin Oyelaran teaches the course and is reached on extension 6241.""",
    "plaster_cast": """Living With a Plaster Cast

A fresh plaster cast needs two full days until it is hard. Keep the arm or leg raised on a pillow during that time.
Move your fingers or toes every hour. The cast must never get wet, so pull a plastic sleeve over it in the shower.

Do not push knitting needles under the cast when it itches. A hair dryer on the cold setting soothes the itch. Blue
or numb fingers are an alarm and must be seen without delay. Friends may paint the cast with felt pens.

A check of the cast is carried out on the following day. The bone is usually pictured again after one week. The cast
is sawn open with a blade that cannot cut skin. Casts made of fibreglass cost 30 euros more. The plaster room is led
by Mr. Ignatius Bloom in room 060.""",
    "isolation": """In Isolation Because of Germs

Some germs no longer react to common antibiotics, which is why you have a room of your own. A yellow sign on the
door reminds everybody of the rules. People who enter put on a gown, gloves and a mask. The gown is thrown into the
bin inside the room.

You may leave the room only with the permission of the hygiene nurse. Swabs from nose and groin are taken every
third day. Isolation ends as soon as three swabs in a row are clean. Your meals come on the same dishes as those of
others.

Books and games should be easy to wipe. Visits by small children are better put off. Washing is done at 60 degrees
and separately. Healthy relatives are hardly at risk. Hygiene nurse Theodora Lunde explains the rules and comes by
each afternoon.""",
}


def write(name: str, text: str) -> Path:
    """One leaflet on one page, its title in bold."""
    from fpdf import FPDF

    title, *paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    page = FPDF(format="A5")
    page.set_creation_date(datetime(2026, 11, 1, tzinfo=UTC))
    page.set_title(title)
    page.set_margin(16)
    page.add_page()
    page.set_font("Helvetica", "B", 15)
    page.multi_cell(0, 9, title, align="L", new_x="LMARGIN", new_y="NEXT")
    page.set_font("Helvetica", size=10.5)
    for paragraph in paragraphs:
        page.ln(3)
        page.multi_cell(0, 5.4, paragraph, align="L", new_x="LMARGIN", new_y="NEXT")
    path = LEAFLETS / f"{name}.pdf"
    page.output(str(path))
    return path


def main() -> None:
    """Write them all."""
    for name, text in TEXTS.items():
        print(write(name, text))


if __name__ == "__main__":
    main()
