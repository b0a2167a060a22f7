"""Word banks of the training generator, all written for this project."""

# ruff: noqa: SIM905

NOUNS = """
gate lamp table chair window door bridge garden kitchen engine bicycle boat ladder basket bottle blanket button
camera candle carpet ceiling chimney clock coat compass cupboard curtain desk drawer envelope fence ferry filter
flag folder fountain furnace glove hammer harbour helmet hose jacket jar kettle keyboard key label lantern lawn
ledger letter lever library locker magnet map market meadow mirror motor museum needle notebook oven paddle paint
parcel passport path pencil pillow pipe planter plate pocket pond poster printer pump puzzle quilt rack radio
railing receipt ribbon river roof rope ruler sail scale scarf screen shed shelf shield shovel signal sink skate
sled soap sofa spoon stable stairs stamp statue stove string suitcase sweater switch tablet tank tent ticket tile
timer tool torch towel tower tractor trail train tray tunnel umbrella valve van vase vest violin wagon wallet
wardrobe warehouse wheel whistle wire workshop yard office station entrance exit lift counter hall corridor
stage studio bakery cafe canteen playground court stadium gallery archive depot port pier camp cabin farm mill
orchard vineyard barn greenhouse observatory laboratory clinic surgery pharmacy ward school classroom theatre
cinema hotel hostel garage airport terminal platform bus tram coach car taxi plane ship cottage castle chapel
tree flower apple pear plum cherry bean potato onion carrot cabbage bread butter cheese milk coffee tea water
juice soup salad sandwich cake rice honey sugar salt pepper fish chicken horse dog cat rabbit sheep goat cow duck
report form invoice contract certificate licence permit card voucher badge brochure catalogue questionnaire list
photo film song book magazine newspaper lecture course lesson exam test meeting concert exhibition tour visit
appointment booking reservation order delivery payment refund deposit discount fee price repair inspection
sample result record file message phone computer network password account battery cable charger sensor robot
member visitor guest patient customer passenger student teacher driver nurse doctor manager assistant guide
baker gardener engineer librarian dentist cook waiter pilot captain farmer clerk guard cleaner painter singer
child parent friend neighbour colleague owner tenant reader player runner swimmer climber volunteer secretary
receptionist chef mechanic plumber electrician porter supervisor trainer instructor officer judge artist
""".split()

ADJECTIVES = """
old new small large green red blue yellow white black grey brown wooden metal heavy light quiet loud warm cold
clean broken empty full open closed northern southern eastern western upper lower main second third first last
early late short long narrow wide deep bright dark fresh dry wet soft hard round square free paid public private
local foreign digital electric annual weekly daily monthly spare special regular temporary official modern
historic covered heated outdoor indoor central rear front left right young tall little big
""".split()

# base, third person, past, participle
VERBS = [
    tuple(line.split(":"))
    for line in """
open:opens:opened:opened
close:closes:closed:closed
repair:repairs:repaired:repaired
clean:cleans:cleaned:cleaned
check:checks:checked:checked
carry:carries:carried:carried
deliver:delivers:delivered:delivered
collect:collects:collected:collected
store:stores:stored:stored
paint:paints:painted:painted
build:builds:built:built
sell:sells:sold:sold
buy:buys:bought:bought
rent:rents:rented:rented
lend:lends:lent:lent
borrow:borrows:borrowed:borrowed
return:returns:returned:returned
use:uses:used:used
move:moves:moved:moved
keep:keeps:kept:kept
bring:brings:brought:brought
leave:leaves:left:left
send:sends:sent:sent
receive:receives:received:received
print:prints:printed:printed
sign:signs:signed:signed
write:writes:wrote:written
read:reads:read:read
show:shows:showed:shown
teach:teaches:taught:taught
visit:visits:visited:visited
watch:watches:watched:watched
guard:guards:guarded:guarded
lock:locks:locked:locked
measure:measures:measured:measured
test:tests:tested:tested
replace:replaces:replaced:replaced
remove:removes:removed:removed
install:installs:installed:installed
order:orders:ordered:ordered
pay:pays:paid:paid
prepare:prepares:prepared:prepared
serve:serves:served:served
cook:cooks:cooked:cooked
bake:bakes:baked:baked
wash:washes:washed:washed
water:waters:watered:watered
feed:feeds:fed:fed
plant:plants:planted:planted
count:counts:counted:counted
find:finds:found:found
lose:loses:lost:lost
hide:hides:hid:hidden
hold:holds:held:held
cover:covers:covered:covered
control:controls:controlled:controlled
manage:manages:managed:managed
organise:organises:organised:organised
record:records:recorded:recorded
book:books:booked:booked
cancel:cancels:cancelled:cancelled
update:updates:updated:updated
inspect:inspects:inspected:inspected
protect:protects:protected:protected
heat:heats:heated:heated
cool:cools:cooled:cooled
fill:fills:filled:filled
empty:empties:emptied:emptied
load:loads:loaded:loaded
supply:supplies:supplied:supplied
choose:chooses:chose:chosen
explain:explains:explained:explained
examine:examines:examined:examined
""".split()
]

FIRST_NAMES = """
Anna Ben Clara David Elena Felix Greta Hugo Irene Jonas Karla Leon Maria Nina Oscar Paula Quentin Rosa Simon Tara
Ursula Victor Wanda Xaver Yara Zeno Amira Boris Chiara Dario Emil Fatima Gustav Hanna Ivan Julia Kofi Lena Marco
Nadia Olga Pedro Rania Stefan Teresa Umar Vera Walter Yusuf Zora Alice Bruno Carmen Dora Ethan Fiona George Helen
Isaac Jenny Kurt Linda Martin Nora Otto Petra Ralf Sara Tom Vivian Noah Mila Liam Ada Ravi Mei Kenji Aisha Omar
""".split()

LAST_NAMES = """
Keller Moser Brandt Fischer Lang Winter Sommer Berger Huber Steiner Roth Vogel Baumann Frey Graf Hofer Kuhn Lehner
Novak Kowal Petrov Silva Costa Rossi Bianchi Moreau Dubois Laurent Garcia Lopez Ortega Khan Patel Singh Tanaka Sato
Nguyen Chen Wong Olsen Berg Dahl Lund Holm Carter Mason Cooper Fletcher Hughes Palmer Porter Turner Walsh Bennett
Clarke Dawson Ellis Foster Grant Harper Jarvis Knight Lawson Marsh Norton Osborne Perry Quinn Reeves Shaw Thorne
""".split()

TITLES = ["Mr", "Mrs", "Ms", "Dr", "Professor"]

STREETS = """
Harbour Mill Station Church Market Garden River Bridge Castle Forest Lake Hill School Park King Queen Linden Oak
Maple Birch Cedar Willow Rose Tower Meadow Spring Stone Silver Copper Canal North South East West Victoria Elm
""".split()

CITIES = """
Zurich Basel Geneva Vienna Prague Lisbon Madrid Oslo Bergen Dublin Leeds York Bristol Lyon Nantes Turin Milan Porto
Kyoto Osaka Lima Quito Cairo Tunis Nairobi Accra Hanoi Delhi Mumbai Toronto Boston Denver Austin Seattle Perth
Tampere Riga Tallinn Vilnius Warsaw Krakow Athens Sofia Zagreb Graz Linz Munich Hamburg Bremen Cologne Dresden
""".split()

MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBER_WORDS = "two three four five six seven eight nine ten eleven twelve".split()
COLOURS = "red blue green yellow white black grey brown orange purple pink".split()
UNITS = "metres kilometres litres grams kilos degrees percent pages seats copies boxes pieces steps".split()
CURRENCIES = ["euros", "francs", "dollars", "pounds", "crowns"]

# Everyday words, so that the tokenizer knows common English beyond the fact bank.
COMMON = """
about above across after again against almost along already also always among another answer anything around arrive
because become before begin behind believe below between beyond both bottom breakfast change choose common complete
condition consider contact contain continue correct could country cover current decide depend describe detail
different difficult dinner direct during each earlier either else end enough ensure enter equal especially even
evening event every everyone everything exactly example except expect experience explain extra family far few final
follow following forget forward further general give glad great group half happen happy health hear help high hold
holiday home hope hour house however hundred if important include including information inside instead interest
issue itself join keep kind know known language large later leave less level like line list live longer look lunch
make many matter maximum mean medicine member minimum minute missing moment more morning most much must name near
necessary need never next night nothing notice number offer often once only other otherwise outside over own part
people per perhaps person place plan please point possible prefer present problem provide quarter question quickly
quite rather ready reach reason receive reduce reduced refer regular remain remember request require required rest
rule safe same save section see seem several should sick side sign simple since single site situation small smoke
smoking some someone soon speak staff start state stay still stop street subject such suitable support sure take
talk team tell text than thank their there therefore these thing think third those through thus time today together
tomorrow tonight total toward travel treatment turn twice type understand until upon usual usually valid value
various very wait waiting walk want warning wear weather week weekend welcome well when whether which while whole
whose why wish within without word work world would wrong year yes yesterday yet young your yourself allergy advice
available allowed arrival departure insurance emergency urgent medication tablet vaccine blood pressure injection
bandage wound fever pain breath heart skin eye ear tooth teeth scan recovery operation anaesthetic physician therapy
therapist surgery specialist consultation prescription referral identity document cash credit parking wheelchair
accessible toilet restroom shower luggage elevator ground floor basement building street corner opposite beside left
interpreter translation website online email telephone extension voicemail reception hotline address postcode
free charge cost costs price prices fine fines penalty invoice bill pay paid payable deadline limit maximum minimum
eat drink fast fasting sleep rest avoid stop careful children adults seniors pensioners students babies infant dog
companion relative relatives family visiting hours quiet noise mobile flash photograph photographs alcohol tobacco
""".split()
